#!/usr/bin/env bash
# transformers 5.23.0, tokenizers 0.23.3: a tokenizer that is saved after use contains the arguments of its last call.
#
# A call with padding and truncation sets both in the Rust tokenizer, where they stay; save_pretrained writes them into
# tokenizer.json. transformers itself resets them in the next call. Whatever else reads the file (the tokenizers
# library, and servers built on it) truncates and pads every text to the length of that one batch, without a warning;
# and the file's hash depends on what the tokenizer was used for.
#
# Expected: save_pretrained writes the same tokenizer.json before and after a call, and six tokens for this text.
# Exits 0 while the behaviour is reproducible, 1 once it has changed.
set -euo pipefail

folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check transformers==5.23.0 tokenizers==0.23.3
cd "$folder"

"$folder/venv/bin/python" - <<'PYTHON'
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

words = {"[UNK]": 0, "[PAD]": 1, "a": 2, "red": 3, "apple": 4}
core = Tokenizer(models.WordLevel(words, unk_token="[UNK]"))
core.pre_tokenizer = pre_tokenizers.Whitespace()
tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, unk_token="[UNK]", pad_token="[PAD]")
text = "a red apple a red apple"


def saved(name):
    """Ids of the text by the saved file alone."""
    tokenizer.save_pretrained(name)
    return Tokenizer.from_file(f"{name}/tokenizer.json").encode(text).ids


before = saved("before")
tokenizer(["a red apple"], padding="max_length", truncation=True, max_length=4)
after = saved("after")
print(before, after)
raise SystemExit(before != [2, 3, 4, 2, 3, 4] or after != [2, 3, 4, 2])
PYTHON
