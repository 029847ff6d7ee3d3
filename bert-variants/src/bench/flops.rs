//! What a model has to compute.

use crate::config::{BertConfig, LocalAttention};
use crate::data::Batch;
use crate::parameters::layout;

/// Floating-point operations of the matrix products of a forward pass, counting multiplications
/// and additions: `2 * tokens * weights of the layers + 2 * labels * weights of the head + 4 *
/// hidden_size * pairs of query and key`, the last summed over layers and sequences.
///
/// A sequence has `seqlen^2` pairs, half of them with causal attention, and in a local layer those
/// inside of the window. A backward pass has twice the operations.
pub(super) fn forward_flops(config: &BertConfig, batch: &Batch) -> f64 {
    let [layers, head] = product_weights(config);
    let products = batch.input_ids.len() * layers + batch.labels.len() * head;
    let lens = batch
        .cu_seqlens
        .windows(2)
        .map(|bounds| bounds[1] - bounds[0]);
    let pairs: usize = lens.map(|len| attention_pairs(config, len)).sum();
    let causal = if config.is_decoder { 0.5 } else { 1.0 };
    2.0 * products as f64 + 4.0 * causal * (config.hidden_size * pairs) as f64
}

/// Weights that every token is multiplied with in the layers, and every label in the head.
fn product_weights(config: &BertConfig) -> [usize; 2] {
    let layout = layout(config);
    let weights = |part: &str| -> usize {
        let matrices = layout
            .iter()
            .filter(|weight| weight.name.starts_with(part) && weight.shape.len() == 2);
        matrices
            .map(|weight| weight.shape.iter().product::<usize>())
            .sum()
    };
    let tied = match config.tie_word_embeddings {
        true => config.vocab_size * config.hidden_size,
        false => 0,
    };
    [weights("encoder.layer."), weights("head.") + tied]
}

/// Pairs of query and key in all layers, for a sequence of `len` tokens.
fn attention_pairs(config: &BertConfig, len: usize) -> usize {
    let layers = config.num_hidden_layers;
    let all = len * len;
    let Some(LocalAttention {
        window,
        layers: local,
        ..
    }) = &config.local
    else {
        return layers * all;
    };
    let window = (*window).min(len.saturating_sub(1));
    // Less the triangles beyond the window on either side.
    let near = len * (2 * window + 1) - window * (window + 1);
    let local = local.iter().filter(|local| **local).count();
    local * near + (layers - local) * all
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::ModelType;

    #[test]
    fn flops_of_small_models_are_those_counted_by_hand() {
        // Lengths 3 and 1, labels at 2 of the tokens.
        let batch = Batch {
            input_ids: vec![1; 4],
            cu_seqlens: vec![0, 3, 4],
            label_positions: vec![0, 3],
            labels: vec![1; 2],
        };
        let config = BertConfig::new(ModelType::Bert, 24, 2, 8, 2, 16);
        // qkv and output 4 * 64, MLP 2 * 8 * 32, in two layers; head 8 * 8 and 24 * 8.
        let products = 4 * 2 * (256 + 512) + 2 * (64 + 192);
        let pairs = 2 * (9 + 1);
        let expected = (2 * products + 4 * 8 * pairs) as f64;
        assert_eq!(forward_flops(&config, &batch), expected);
        let causal = (2 * products + 2 * 8 * pairs) as f64;
        assert_eq!(forward_flops(&config.with_decoder(true), &batch), causal);

        // Layers 1 and 2 of three are local: of 9 pairs, a window of 1 leaves 7. The gated MLP has
        // three products.
        let mut config = BertConfig::new(ModelType::Modernbert, 24, 3, 8, 2, 16);
        config.intermediate_size = 16;
        if let Some(local) = &mut config.local {
            local.window = 1;
        }
        let products = 4 * 3 * (256 + 3 * 8 * 16) + 2 * (64 + 192);
        let pairs = (9 + 7 + 7) + 3;
        let expected = (2 * products + 4 * 8 * pairs) as f64;
        assert_eq!(forward_flops(&config, &batch), expected);
    }
}
