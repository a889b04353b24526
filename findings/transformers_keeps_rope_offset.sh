#!/usr/bin/env bash
# transformers 5.23.0: what Qwen2.5-VL predicts for a text depends on the image that it was shown before.
#
# The 64 tokens of an image of 8 x 8 take up 8 rotary positions. The model keeps the difference for its last image in
# `rope_deltas`, an attribute, to continue that prompt token by token. A later prompt without an image, with a cache of
# its own, does not reset it: its first pass has positions 0, 1, 2, …, and the tokens that follow with the cache are
# moved by the image's difference. `generate` resets the attribute; loops over `forward`, such as those of speculative or
# constrained decoding, or scores of several answers to one prompt, do not.
#
# Expected: tokens that are fed one by one with a cache get the logits of the whole text in one pass, as they do before
# the first image. Actual: after the image each of them is 56 positions too early, before the text itself. Exits 0 while
# the behaviour is reproducible, 1 once it has changed.
set -euo pipefail

folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check torch==2.13.0 transformers==5.23.0
cd "$folder"

"$folder/venv/bin/python" - <<'PYTHON'
import torch
from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

IMAGE = 60
rope = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 3, 3]}
text_model = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "rope_parameters": rope,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "initializer_range": 0.3,
}
vision = {"depth": 1, "hidden_size": 32, "intermediate_size": 32, "num_heads": 2, "out_hidden_size": 32}
torch.manual_seed(0)
config = Qwen2_5_VLConfig(
    text_config=text_model,
    vision_config={**vision, "fullatt_block_indexes": [0]},
    image_token_id=IMAGE,
    vision_start_token_id=62,
    vision_end_token_id=63,
)
model = Qwen2_5_VLForConditionalGeneration(config).eval()
text = torch.tensor([[3, 4, 5, 6, 7, 8, 9, 10, 11]])


@torch.no_grad()
def largest_error():
    """Of the logits of the text's last four tokens, fed one by one with a cache, against those of the text at once."""
    whole = model(input_ids=text, use_cache=False).logits[0, -4:]
    cache = model(input_ids=text[:, :-4], use_cache=True).past_key_values
    steps = [model(input_ids=text[:, [i]], past_key_values=cache, use_cache=True).logits[0, -1] for i in range(5, 9)]
    return (torch.stack(steps) - whole).abs().max().item() / whole.std().item()


before = largest_error()
prompt = torch.tensor([[3, 62, *[IMAGE] * 64, 63, 5]])
with torch.no_grad():
    model(
        input_ids=prompt,
        pixel_values=torch.randn(16 * 16, 3 * 2 * 14 * 14),
        image_grid_thw=torch.tensor([[1, 16, 16]]),
        mm_token_type_ids=(prompt == IMAGE).int(),
    )
after, offset = largest_error(), model.model.rope_deltas.tolist()
print(f"largest error of a text's logits, in standard deviations: {before:.1e} before an image, {after:.2f} after it")
print("kept offset:", offset)
raise SystemExit(before > 1e-4 or after < 0.1 or offset != [[-56]])
PYTHON
