//! Training a WordPiece vocabulary.
//!
//! The pieces are those of byte-pair merges over the letters of words, as the trainer of the
//! `tokenizers` crate makes them. That trainer numbers pieces and breaks ties in the order of a
//! randomly seeded hash map; this one gives the same vocabulary every time, so that runs can be
//! repeated and caches found again.

use std::cmp::Reverse;
use std::collections::{BinaryHeap, HashMap};

use anyhow::{Result, ensure};

/// Letters kept; words with rarer ones become `[UNK]`.
const MAX_ALPHABET: usize = 1000;
/// Longer words are always `[UNK]`.
const MAX_WORD_CHARS: usize = 100;
/// A pair that occurs less often is no piece.
const MIN_COUNT: u64 = 2;
const CONTINUES: &str = "##";

/// Two neighbouring pieces.
type Pair = (u32, u32);

/// The pieces: `special`, then single letters, then merges, the most frequent first.
pub(super) fn vocabulary(
    words: &HashMap<String, u64>,
    vocab_size: usize,
    special: Vec<String>,
) -> Result<Vec<String>> {
    let mut pieces = Pieces::new(special);
    let mut words = spell(words, &mut pieces);
    ensure!(
        !words.is_empty(),
        "found no words to train a vocabulary from"
    );
    ensure!(
        pieces.names.len() <= vocab_size,
        "a vocabulary of {vocab_size} pieces has no room for the special tokens and letters of \
         the text; expected at least {}",
        pieces.names.len()
    );
    let mut pairs = Pairs::new(&words);
    while pieces.names.len() < vocab_size {
        let Some(pair) = pairs.pop() else { break };
        pairs.merge(pair, pieces.merge(pair), &mut words);
    }
    Ok(pieces.names)
}

/// Pieces and their ids.
struct Pieces {
    names: Vec<String>,
    ids: HashMap<String, u32>,
}

impl Pieces {
    fn new(special: Vec<String>) -> Self {
        let mut pieces = Self {
            names: Vec::new(),
            ids: HashMap::new(),
        };
        for name in special {
            pieces.id(name);
        }
        pieces
    }

    /// The id of a piece, new where it is.
    fn id(&mut self, name: String) -> u32 {
        *self.ids.entry(name).or_insert_with_key(|name| {
            self.names.push(name.clone());
            self.names.len() as u32 - 1
        })
    }

    fn merge(&mut self, (left, right): Pair) -> u32 {
        let right = &self.names[right as usize];
        let right = right.strip_prefix(CONTINUES).unwrap_or(right);
        self.id(format!("{}{right}", self.names[left as usize]))
    }
}

/// A word of the text in its present pieces.
struct Word {
    pieces: Vec<u32>,
    count: u64,
}

impl Word {
    fn pairs(&self) -> impl Iterator<Item = Pair> {
        self.pieces.windows(2).map(|pair| (pair[0], pair[1]))
    }

    fn merge(&mut self, pair: Pair, merged: u32) {
        let mut i = 0;
        while i + 1 < self.pieces.len() {
            if (self.pieces[i], self.pieces[i + 1]) == pair {
                self.pieces[i] = merged;
                self.pieces.remove(i + 1);
            }
            i += 1;
        }
    }
}

/// All words in single letters, in alphabetical order.
fn spell(counts: &HashMap<String, u64>, pieces: &mut Pieces) -> Vec<Word> {
    let mut letters: HashMap<char, u64> = HashMap::new();
    for (word, count) in counts {
        for letter in word.chars() {
            *letters.entry(letter).or_default() += count;
        }
    }
    let mut alphabet: Vec<(Reverse<u64>, char)> = letters
        .into_iter()
        .map(|(letter, count)| (Reverse(count), letter))
        .collect();
    alphabet.sort_unstable();
    alphabet.truncate(MAX_ALPHABET);
    let mut alphabet: Vec<char> = alphabet.into_iter().map(|(_, letter)| letter).collect();
    alphabet.sort_unstable();
    for letter in &alphabet {
        pieces.id(letter.to_string());
    }

    let mut words: Vec<(&String, &u64)> = counts.iter().collect();
    words.sort_unstable();
    let mut spelt = Vec::new();
    for (word, &count) in words {
        let known = |letter: char| alphabet.binary_search(&letter).is_ok();
        if word.chars().all(known) && word.chars().count() <= MAX_WORD_CHARS {
            let spell = |(i, letter): (usize, char)| {
                pieces.id(format!("{}{letter}", if i == 0 { "" } else { CONTINUES }))
            };
            spelt.push(Word {
                pieces: word.chars().enumerate().map(spell).collect(),
                count,
            });
        }
    }
    spelt
}

/// How often pairs occur, and where.
#[derive(Default)]
struct Pairs {
    counts: HashMap<Pair, u64>,
    /// Words that hold a pair, or once did.
    words: HashMap<Pair, Vec<usize>>,
    /// Every count that a pair has had; among equals the smaller ids come first.
    queue: BinaryHeap<(u64, Reverse<Pair>)>,
}

impl Pairs {
    fn new(words: &[Word]) -> Self {
        let mut pairs = Self::default();
        let mut changes = HashMap::new();
        for (index, word) in words.iter().enumerate() {
            for pair in word.pairs() {
                *changes.entry(pair).or_default() += word.count as i64;
                pairs.words.entry(pair).or_default().push(index);
            }
        }
        pairs.apply(changes);
        pairs
    }

    /// The most frequent pair, `None` when no pair is frequent enough.
    fn pop(&mut self) -> Option<Pair> {
        while let Some((count, Reverse(pair))) = self.queue.pop() {
            if count == self.counts[&pair] {
                return (count >= MIN_COUNT).then_some(pair);
            }
        }
        None
    }

    /// Makes `pair` the piece `merged` in all words.
    fn merge(&mut self, pair: Pair, merged: u32, words: &mut [Word]) {
        let mut changes = HashMap::new();
        let mut indices = self.words.remove(&pair).unwrap_or_default();
        indices.dedup();
        for index in indices {
            let word = &mut words[index];
            for pair in word.pairs() {
                *changes.entry(pair).or_default() -= word.count as i64;
            }
            word.merge(pair, merged);
            for pair in word.pairs() {
                *changes.entry(pair).or_default() += word.count as i64;
                if pair.0 == merged || pair.1 == merged {
                    self.words.entry(pair).or_default().push(index);
                }
            }
        }
        self.apply(changes);
    }

    fn apply(&mut self, changes: HashMap<Pair, i64>) {
        for (pair, change) in changes.into_iter().filter(|(_, change)| *change != 0) {
            let count = self.counts.entry(pair).or_default();
            *count = count.saturating_add_signed(change);
            self.queue.push((*count, Reverse(pair)));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn train(words: &[(&str, u64)], vocab_size: usize) -> Result<Vec<String>> {
        let words = words
            .iter()
            .map(|&(word, count)| (word.to_string(), count))
            .collect();
        vocabulary(&words, vocab_size, vec!["[UNK]".to_string()])
    }

    #[test]
    fn merges_the_most_frequent_pairs_first() {
        let words = [("low", 5), ("lower", 2), ("newest", 6), ("widest", 3)];
        let pieces = train(&words, 100).unwrap();
        let letters = ["d", "e", "i", "l", "n", "o", "r", "s", "t", "w"];
        assert_eq!(pieces[0], "[UNK]");
        assert_eq!(pieces[1..11], letters);
        // es (9), est (9), lo (7), low (7), then the pairs of newest (6).
        let merges: Vec<&String> = pieces
            .iter()
            .filter(|p| p.trim_matches('#').len() > 1)
            .collect();
        assert_eq!(merges[1..5], ["##es", "##est", "lo", "low"]);
        assert!(pieces.iter().any(|piece| piece == "newest"));
        assert!(pieces.iter().any(|piece| piece == "widest"));
    }

    #[test]
    fn agrees_with_the_tokenizers_crate() {
        use tokenizers::models::wordpiece::{WordPiece, WordPieceTrainer};
        use tokenizers::{Model, Trainer};
        // Counts are such that no two pairs tie.
        let words = [
            ("banana", 64),
            ("bandana", 16),
            ("cab", 4),
            ("cabin", 256),
            ("bin", 1024),
        ];
        let text: Vec<String> = words
            .iter()
            .map(|(word, n)| format!("{word} ").repeat(*n))
            .collect();
        let mut trainer = WordPieceTrainer::builder()
            .vocab_size(26)
            .show_progress(false)
            .build();
        trainer
            .feed(text.iter(), |text| {
                Ok(text.split_whitespace().map(str::to_string).collect())
            })
            .unwrap();
        let mut model = WordPiece::default();
        trainer.train(&mut model).unwrap();
        let mut expected: Vec<String> = model.get_vocab().into_keys().collect();
        expected.sort();

        let words: Vec<(&str, u64)> = words.iter().map(|(word, n)| (*word, *n as u64)).collect();
        let mut pieces = train(&words, 27).unwrap();
        pieces.retain(|piece| piece != "[UNK]");
        pieces.sort();
        assert_eq!(pieces, expected);
    }

    #[test]
    fn refuses_a_vocabulary_without_room_for_letters_and_text_without_words() {
        let error = train(&[("abc", 3)], 5).unwrap_err().to_string();
        assert!(error.contains("expected at least 6"), "{error}");
        assert!(train(&[], 5).unwrap_err().to_string().contains("no words"));
    }

    proptest::proptest! {
        #[test]
        fn is_repeatable_and_within_size(
            words in proptest::collection::hash_map("[a-e]{1,8}", 1_u64..9, 1..40),
            vocab_size in 12_usize..60,
        ) {
            let train = || vocabulary(&words.clone().into_iter().collect(), vocab_size, vec![]);
            let pieces = train().unwrap();
            proptest::prop_assert!(pieces.len() <= vocab_size);
            proptest::prop_assert_eq!(&pieces, &train().unwrap());
            let mut unique = pieces.clone();
            unique.sort();
            unique.dedup();
            proptest::prop_assert_eq!(unique.len(), pieces.len());
        }
    }
}
