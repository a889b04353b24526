#!/usr/bin/env bash
# transformers 5.23.0: where positions skip or repeat a number, tokens do not see earlier ones, but only in training.
#
# Cheap training for long contexts skips positions (PoSE: tokens 0 to 3 at positions 0 to 3, the next ones at 104 to
# 107); other schemes give several tokens one position. transformers takes every step of positions other than 1 for the
# beginning of another packed sequence, and masks attention across it, if there is neither an attention_mask nor a
# cache: with use_cache=False, as training sets it, but not when the same inputs are evaluated with the default.
#
# Expected: position_ids change the rotation alone, and use_cache changes no logits. Actual: with use_cache=False the
# tokens after the gap do not depend on those before it, so that attention over long distances is not trained at all.
# An attention_mask of ones, which means the same as none, switches it off. Exits 0 while the behaviour is reproducible,
# 1 once it has changed.
set -euo pipefail

folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check torch==2.13.0 transformers==5.23.0
cd "$folder"

"$folder/venv/bin/python" - <<'PYTHON'
import torch
from transformers import LlamaConfig, LlamaForCausalLM

shape = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
torch.manual_seed(0)
model = LlamaForCausalLM(LlamaConfig(vocab_size=50, num_key_value_heads=2, **shape))
tokens = torch.randint(50, (1, 8))
other = tokens.clone()
other[0, 0] = (tokens[0, 0] + 1) % 50


def effect(positions, **settings):
    """The largest change of the last token's logits when the first token changes."""
    inputs = {"position_ids": torch.tensor([positions]), **settings}
    with torch.no_grad():
        first, second = (model(each, **inputs).logits[0, -1] for each in (tokens, other))
    return (first - second).abs().max().item()


gap, repeated = [0, 1, 2, 3, 104, 105, 106, 107], [0, 1, 2, 3, 3, 4, 5, 6]
ones = torch.ones_like(tokens)
seen = {
    "positions with a gap": effect(gap),
    "positions with a gap, use_cache=False, a mask of ones": effect(gap, use_cache=False, attention_mask=ones),
    "positions 0 to 7, use_cache=False": effect(list(range(8)), use_cache=False),
}
unseen = {
    "positions with a gap, use_cache=False": effect(gap, use_cache=False),
    "a repeated position, use_cache=False": effect(repeated, use_cache=False),
}
for what, change in {**seen, **unseen}.items():
    print(f"{what}: the first token changes the last one's logits by {change:.4f}")
raise SystemExit(min(seen.values()) < 0.01 or max(unseen.values()) != 0)
PYTHON
