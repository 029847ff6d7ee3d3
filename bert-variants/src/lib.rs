//! BERT variants that differ in position encoding only: pretraining, comparison and
//! Hugging Face checkpoints, on Candle.

pub mod config;
pub mod data;
pub mod record;
pub mod report;
