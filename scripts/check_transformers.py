"""Checks that transformers loads what we save, and computes the same.

    cargo run --release --example save_zoo -- DIR
    python scripts/check_transformers.py DIR

Every folder of DIR is loaded by the Auto class that its config.json names, which must report no
missing, unexpected or mismatched weight, and run on `expected.safetensors`.
"""

import json
import sys
from pathlib import Path

import torch
import transformers
from safetensors.torch import load_file

TOLERANCE = 2e-5
CLASSES = {
    "ForMaskedLM": "AutoModelForMaskedLM",
    "LMHeadModel": "AutoModelForCausalLM",
    "ForCausalLM": "AutoModelForCausalLM",
    "ForSequenceClassification": "AutoModelForSequenceClassification",
    "ForTokenClassification": "AutoModelForTokenClassification",
    "ForQuestionAnswering": "AutoModelForQuestionAnswering",
    "Model": "AutoModel",
}


def load(folder):
    name = json.loads((folder / "config.json").read_text())["architectures"][0]
    auto = next(auto for end, auto in CLASSES.items() if name.endswith(end))
    model, info = getattr(transformers, auto).from_pretrained(
        folder, output_loading_info=True, trust_remote_code=True, attn_implementation="eager"
    )
    assert type(model).__name__ == name, (type(model).__name__, name)
    bad = {key: sorted(names) for key, names in info.items() if names and key != "error_msgs"}
    return model.eval(), bad


def run(model, expected):
    with torch.no_grad():
        outputs = model(input_ids=expected["input_ids"])
    if hasattr(outputs, "start_logits"):
        return torch.stack([outputs.start_logits, outputs.end_logits], dim=-1)[0]
    if hasattr(outputs, "logits"):
        logits = outputs.logits
        return logits[0] if logits.dim() == 3 else logits
    return outputs.last_hidden_state.mean(dim=1)


def main():
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    folders = sorted(path.parent for path in Path(sys.argv[1]).glob("*/expected.safetensors"))
    assert folders, "no models found"
    failures = skipped = 0
    print(f"transformers {transformers.__version__}, torch {torch.__version__}")
    for folder in folders:
        kind = json.loads((folder / "config.json").read_text())["model_type"]
        if kind != "alibi" and kind not in transformers.CONFIG_MAPPING:
            print(f"{folder.name:40} skipped: not in this version of transformers")
            skipped += 1
            continue
        model, bad = load(folder)
        expected = load_file(folder / "expected.safetensors")
        difference = (run(model, expected) - expected["logits"]).abs().max().item()
        scale = expected["logits"].abs().max().item()
        good = not bad and difference <= TOLERANCE * scale
        failures += not good
        print(f"{folder.name:40} {difference:.1e} of {scale:7.3f} {'' if good else 'FAILED'} {bad or ''}")
    print(f"{len(folders) - failures - skipped} equal, {failures} failed, {skipped} skipped")
    sys.exit(failures > 0)


if __name__ == "__main__":
    main()
