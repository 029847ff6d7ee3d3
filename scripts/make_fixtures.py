"""Makes bert-variants/tests/fixtures: tiny random models of every type and head, made, saved and
run by transformers, for the parity tests in Rust.

Each folder holds the model as transformers saves it, `gradients.safetensors` (the gradient of the
loss under the names of the weights) and `expected.safetensors` (inputs, padded; last hidden state,
logits, loss). Values are computed in f64 and stored in f32; versions are in the metadata.

    pip install torch==2.8.* transformers==5.* && python scripts/make_fixtures.py
"""

import json
import shutil
import sys
import tempfile
from pathlib import Path

import torch
import transformers
from safetensors.torch import save_file
from transformers import AutoConfig

ROOT = Path(__file__).resolve().parent.parent / "bert-variants"
FIXTURES = ROOT / "tests" / "fixtures"

sys.path.insert(0, str(ROOT / "src" / "checkpoint"))
import modeling_alibi  # noqa: E402

MODULES = {
    "bert": "Bert",
    "roformer": "RoFormer",
    "alibi": "Alibi",
    "mpnet": "MPNet",
    "modernbert": "ModernBert",
    "nomic_bert": "NomicBert",
    "distilbert": "DistilBert",
    "roberta": "Roberta",
}
TASKS = {
    "masked-lm": "ForMaskedLM",
    "causal-lm": "ForCausalLM",
    "sequence": "ForSequenceClassification",
    "token": "ForTokenClassification",
    "question": "ForQuestionAnswering",
    "base": "Model",
}
# Models that differ from those of the task by keys of their configuration.
VARIANTS = {
    ("nomic_bert", "linear"): dict(
        rope_parameters=dict(rope_type="linear", rope_theta=100.0, factor=2.0)
    ),
    ("modernbert", "yarn"): dict(
        rope_parameters=dict(
            full_attention=dict(
                rope_type="yarn",
                rope_theta=10.0,
                factor=4.0,
                original_max_position_embeddings=16,
                beta_fast=2.0,
            ),
            sliding_attention=dict(rope_type="default", rope_theta=50.0),
        )
    ),
}
LABELS = 3


def tasks_of(kind):
    tasks = ["masked-lm", "sequence", "token"]
    if kind != "nomic_bert":
        tasks.append("question")
    if kind in ("bert", "roformer", "alibi", "roberta"):
        tasks.append("causal-lm")
    if kind in ("bert", "roberta", "mpnet", "alibi"):
        tasks.append("base")
    return tasks


def make_config(kind, task, variant):
    large = task == "masked-lm"
    hidden, layers, heads, mlp, vocab = (16, 2, 2, 20, 32) if large else (8, 1, 2, 12, 24)
    sizes = dict(vocab_size=vocab, max_position_embeddings=16)
    if kind == "distilbert":
        sizes |= dict(dim=hidden, n_layers=layers, n_heads=heads, hidden_dim=mlp)
    else:
        sizes |= dict(
            hidden_size=hidden,
            num_hidden_layers=layers,
            num_attention_heads=heads,
            intermediate_size=mlp,
        )
    if kind == "modernbert":
        # A window that is narrower than the inputs, and the variety of the other keys.
        sizes |= dict(local_attention=6, global_attn_every_n_layers=2, pad_token_id=0)
        sizes |= dict(bos_token_id=None, eos_token_id=None, cls_token_id=None, sep_token_id=None)
        if task == "sequence":
            sizes |= dict(classifier_pooling="mean", classifier_bias=True, norm_bias=True)
        if task == "token":
            sizes |= dict(attention_bias=True, mlp_bias=True)
    if kind == "roformer" and task == "sequence":
        sizes |= dict(hidden_act="relu")
    if kind == "bert" and task == "sequence":
        sizes |= dict(hidden_act="gelu_new", problem_type="multi_label_classification")
    if task == "causal-lm":
        sizes |= dict(is_decoder=True)
    if task in ("sequence", "token"):
        labels = 1 if kind == "distilbert" and task == "sequence" else LABELS
        sizes |= dict(num_labels=labels)
    sizes |= VARIANTS.get((kind, variant), {})
    if kind == "alibi":
        return modeling_alibi.AlibiConfig(**sizes)
    return AutoConfig.for_model(kind, **sizes)


def make_model(kind, task, variant):
    config = make_config(kind, task, variant)
    name = MODULES[kind] + TASKS[task]
    if (kind, task) == ("bert", "causal-lm"):
        name = "BertLMHeadModel"
    if kind == "alibi":
        return getattr(modeling_alibi, name)(config)
    return getattr(transformers, name)._from_config(config, attn_implementation="eager")


def randomize(model, generator):
    """Values that let every weight matter, unlike freshly initialised ones."""
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        noise = torch.randn(parameter.shape, generator=generator)
        norm = parameter.dim() == 1 and name.endswith("weight")
        with torch.no_grad():
            if norm:
                parameter.copy_(1 + 0.2 * noise)
            elif parameter.dim() == 1:
                parameter.copy_(0.1 * noise)
            else:
                parameter.copy_(noise * 0.6 * (16 / parameter.shape[-1]) ** 0.5 * 0.5)


def make_inputs(kind, task, config, generator):
    # Padding beyond a window would see no token at all, which is NaN in transformers.
    shortest = 8 if kind == "modernbert" else 4
    lengths = torch.tensor([7, 7] if task == "question" else [11, shortest, 9])
    longest = int(lengths.max())
    pad = config.pad_token_id if config.pad_token_id is not None else 0
    mask = (torch.arange(longest)[None, :] < lengths[:, None]).long()
    # From 3 on, so that no token is taken for padding.
    ids = torch.randint(3, config.vocab_size, mask.shape, generator=generator)
    inputs = dict(input_ids=torch.where(mask == 1, ids, pad), attention_mask=mask)
    if getattr(config, "type_vocab_size", 0) > 1 and kind != "roberta":
        inputs["token_type_ids"] = (torch.arange(longest)[None, :] >= lengths[:, None] // 2) * mask
    rows = len(lengths)
    if task in ("masked-lm", "causal-lm", "token"):
        classes = LABELS if task == "token" else config.vocab_size
        labels = torch.randint(0, classes, mask.shape, generator=generator)
        keep = (torch.rand(mask.shape, generator=generator) < 0.5) & (mask == 1)
        keep[:, 1] = True
        inputs["labels"] = torch.where(keep, labels, -100)
    elif task == "sequence" and config.num_labels == 1:
        inputs["labels"] = torch.randn(rows, generator=generator)
    elif task == "sequence" and config.problem_type == "multi_label_classification":
        inputs["labels"] = torch.randint(0, 2, (rows, LABELS), generator=generator).float()
    elif task == "sequence":
        inputs["labels"] = torch.randint(0, LABELS, (rows,), generator=generator)
    elif task == "question":
        inputs["start_positions"] = torch.tensor([1, 3])
        inputs["end_positions"] = torch.tensor([2, 6])
    return inputs, lengths


def run(model, task, inputs):
    hidden = {}
    base = model if task == "base" else getattr(model, model.base_model_prefix)

    def keep(module, args, output):
        hidden["last"] = output.last_hidden_state

    handle = base.register_forward_hook(keep)
    double = {k: v.double() if v.is_floating_point() else v for k, v in inputs.items()}
    outputs = model(**double)
    handle.remove()
    if task == "base":
        logits = outputs.pooler_output
        loss = logits.square().mean()
    elif task == "question":
        logits = torch.stack([outputs.start_logits, outputs.end_logits], dim=-1)
        loss = outputs.loss
    else:
        logits, loss = outputs.logits, outputs.loss
    return hidden["last"], logits, loss


def save(model, folder):
    model.save_pretrained(folder)
    (folder / "model.safetensors").chmod(0o644)
    for extra in ("generation_config.json", "modeling_alibi.py"):
        (folder / extra).unlink(missing_ok=True)


def make(kind, task, seed, variant=None):
    generator = torch.Generator().manual_seed(seed)
    model = make_model(kind, task, variant).eval()
    randomize(model, generator)
    folder = FIXTURES / "-".join(filter(None, [kind, task, variant]))
    save(model, folder)
    if kind == "alibi":
        path = folder / "config.json"
        config = json.loads(path.read_text())
        config.pop("auto_map", None)
        path.write_text(json.dumps(config, indent=2) + "\n")

    inputs, lengths = make_inputs(kind, task, model.config, generator)
    model.double()
    hidden, logits, loss = run(model, task, inputs)
    loss.backward()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.copy_(torch.zeros_like(parameter) if parameter.grad is None else parameter.grad)
    with tempfile.TemporaryDirectory() as temporary:
        save(model.float(), Path(temporary))
        shutil.copy(Path(temporary) / "model.safetensors", folder / "gradients.safetensors")

    expected = {k: v.contiguous() for k, v in inputs.items() if k != "attention_mask"}
    expected |= dict(lengths=lengths, last_hidden_state=hidden, logits=logits, loss=loss[None])
    expected = {
        k: (v.float() if v.is_floating_point() else v.int()).detach().contiguous()
        for k, v in expected.items()
    }
    versions = dict(transformers=transformers.__version__, torch=torch.__version__)
    save_file(expected, folder / "expected.safetensors", metadata=versions)
    (folder / "expected.safetensors").chmod(0o644)
    print(f"{folder.name}: loss {float(loss):.4f}")


def main():
    transformers.utils.logging.disable_progress_bar()
    shutil.rmtree(FIXTURES, ignore_errors=True)
    FIXTURES.mkdir(parents=True)
    for number, kind in enumerate(MODULES):
        for offset, task in enumerate(tasks_of(kind)):
            make(kind, task, 100 * number + offset)
    for number, (kind, variant) in enumerate(VARIANTS):
        make(kind, "masked-lm", 1000 + number, variant)


if __name__ == "__main__":
    main()
