//! BERT variants that differ in position encoding only: pretraining, comparison and
//! Hugging Face checkpoints, on Candle.

pub mod checkpoint;
pub mod config;
pub mod data;
pub mod memory;
pub mod model;
pub mod parameters;
pub mod record;
pub mod report;
pub mod schedule;
pub mod settings;
pub mod tokenizer;
pub mod train;
