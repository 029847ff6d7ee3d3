//! Saves a small model of every kind and head, with the results that Python must get from it:
//! `cargo run --release --example save_zoo -- DIR`, then `python scripts/check_transformers.py DIR`.

use std::path::PathBuf;

use anyhow::{Context, Result};
use bert_variants::checkpoint::{ModelCard, save_pretrained};
use bert_variants::config::{BertConfig, Dropouts, ModelType, Position, Task};
use bert_variants::model::{
    LanguageModel, SentenceEncoder, SequenceClassifier, TokenClassifier, Tokens,
};
use bert_variants::parameters::Parameters;
use candle_core::{DType, Device, Tensor};
use candle_rope_attn::{RopeScaling, Yarn};
use clap::ValueEnum;

const LENGTH: usize = 20;

fn main() -> Result<()> {
    let out = PathBuf::from(std::env::args().nth(1).context("usage: save_zoo DIR")?);
    for model_type in ModelType::value_variants() {
        for (task, causal) in tasks(*model_type) {
            let mut config = BertConfig::new(*model_type, 60, 4, 32, 4, LENGTH);
            config.dropout = Dropouts::of_hidden(0.1);
            config.labels = ["red", "green", "blue"].map(String::from).to_vec();
            let mut config = config.with_task(task).with_decoder(causal);
            // Larger than usual, so that outputs differ from 0 and from each other.
            config.initializer_range = 0.3;
            // Narrower than the input.
            config.local.iter_mut().for_each(|local| local.window = 4);
            // What only version 5 of transformers stretches, like this whole model.
            if let (
                ModelType::NomicBert,
                Task::TokenClassification,
                Position::Rope { scaling, .. },
            ) = (*model_type, task, &mut config.position)
            {
                *scaling = RopeScaling::Yarn(Yarn::new(4.0, LENGTH / 2));
            }
            let parameters = Parameters::init(&config, 1, &Device::Cpu)?;
            let causal = if causal { "-causal" } else { "" };
            let dir = out.join(format!("{}-{task:?}{causal}", model_type.name()));
            save_pretrained(&dir, &config, &parameters, None, &ModelCard::default())?;
            let (ids, logits) = run(&config, &parameters)?;
            let ids = Tensor::from_vec(ids, (1, LENGTH), &Device::Cpu)?;
            let results = [("input_ids", ids), ("logits", logits)].map(|(k, v)| (k.to_string(), v));
            candle_core::safetensors::save(&results.into(), dir.join("expected.safetensors"))?;
            println!("{}", dir.display());
        }
    }
    Ok(())
}

fn tasks(model_type: ModelType) -> Vec<(Task, bool)> {
    use ModelType::{Alibi, Bert, NomicBert, Roberta, Roformer};
    let mut tasks = vec![
        (Task::Base, false),
        (Task::LanguageModel, false),
        (Task::SequenceClassification, false),
        (Task::TokenClassification, false),
    ];
    if model_type != NomicBert {
        tasks.push((Task::QuestionAnswering, false));
    }
    if matches!(model_type, Bert | Roformer | Alibi | Roberta) {
        tasks.push((Task::LanguageModel, true));
    }
    tasks
}

/// Ids and scores of one sequence; of a base model, the mean of its hidden states.
fn run(config: &BertConfig, parameters: &Parameters) -> Result<(Vec<i64>, Tensor)> {
    let ids: Vec<u32> = (0..LENGTH as u32).map(|i| 3 + i * i * 7 % 57).collect();
    let everywhere: Vec<u32> = (0..LENGTH as u32).collect();
    let tokens = Tokens {
        ids: &ids,
        cu_seqlens: &[0, LENGTH],
        token_type_ids: None,
    };
    let (c, p, f32) = (config, parameters, DType::F32);
    let logits = match config.task {
        Task::Base => SentenceEncoder::new(c, p, false, f32)?.mean(&tokens, None),
        Task::LanguageModel => {
            LanguageModel::new(c, p, false, f32)?.logits(&tokens, &everywhere, None)
        }
        Task::SequenceClassification => {
            SequenceClassifier::new(c, p, false, f32)?.logits(&tokens, None)
        }
        Task::TokenClassification | Task::QuestionAnswering => {
            TokenClassifier::new(c, p, false, f32)?.logits(&tokens, None)
        }
    };
    Ok((ids.into_iter().map(i64::from).collect(), logits?))
}
