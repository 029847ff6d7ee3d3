//! The embedded corpus: short tales that a seeded generator writes.
//!
//! The tales are made so that context and order matter, as they do in natural text:
//!
//! - Names of people and places are made up for each tale and come back throughout it, as do an
//!   age, a price, and a thing of a certain colour and material: they can only be predicted from
//!   where the tale introduced them.
//! - Pronouns and possessives follow the person they stand for; verbs follow their subject.
//! - A tale keeps to one trade, whose nouns, verbs and adjectives fill its sentences.
//! - Things packed in the morning are unpacked in reverse order, week days and seasons advance,
//!   and counts add up.
//!
//! A model that knows only how frequent words are cannot do any of that.
//!
//! Tale number `i` of a seed is always the same text, whatever the number of tales.

mod words;

use std::fmt;

use anyhow::Result;
use indicatif::ProgressBar;
use rand::seq::{IndexedRandom, SliceRandom};
use rand::{Rng, SeedableRng};
use rand_chacha::ChaCha8Rng;

use super::readers::{Emit, Passage};
use words::{
    COLOURS, DAYS, END, KEEPSAKES, MATERIALS, MIDDLE, NUMBERS, OPENING, PACKED, SEASONS, SYLLABLES,
    TOPICS, TOWN_ENDINGS, Topic,
};

/// Version of the generator: changes with the text it writes.
const VERSION: u32 = 1;

/// Which tales to write.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Corpus {
    /// Number of tales, of about 1 kB each.
    pub documents: usize,
    /// Seed of the generator.
    pub seed: u64,
}

impl fmt::Display for Corpus {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "embedded corpus (version {VERSION}, seed {})", self.seed)
    }
}

impl Corpus {
    /// Tale number `index`.
    pub fn document(&self, index: usize) -> String {
        let mut rng = ChaCha8Rng::seed_from_u64(self.seed);
        rng.set_stream(index as u64);
        Tale::new(rng).write()
    }

    /// Text that is equal only for equal tales.
    pub(crate) fn identity(&self) -> String {
        format!("{self}, {} tales\n", self.documents)
    }

    pub(crate) fn read(&self, progress: &ProgressBar, emit: Emit) -> Result<()> {
        for index in 0..self.documents {
            emit(Passage {
                text: self.document(index),
                ends_document: true,
            })?;
            progress.inc(1);
        }
        Ok(())
    }
}

/// What stays the same within a tale, by the names that templates use.
struct Tale {
    rng: ChaCha8Rng,
    topic: &'static Topic,
    facts: Vec<(&'static str, String)>,
}

impl Tale {
    fn new(mut rng: ChaCha8Rng) -> Self {
        let topic = pick(&mut rng, TOPICS);
        let mut tale = Self {
            topic,
            facts: vec![
                ("workplace", topic.workplace.into()),
                ("trade", topic.trade.into()),
            ],
            rng,
        };
        tale.introduce_people();
        tale.introduce_things();
        tale
    }

    fn introduce_people(&mut self) {
        let hero_is_woman = self.rng.random_bool(0.5);
        let hero = name(&mut self.rng, if hero_is_woman { "a" } else { "o" });
        let friend = name(&mut self.rng, if hero_is_woman { "us" } else { "ine" });
        let [he, him, his] = if hero_is_woman {
            ["she", "her", "her"]
        } else {
            ["he", "him", "his"]
        };
        let [friend_he, friend_his] = if hero_is_woman {
            ["he", "his"]
        } else {
            ["she", "her"]
        };
        let ending = pick(&mut self.rng, TOWN_ENDINGS);
        let town = name(&mut self.rng, ending);
        let age = number(self.rng.random_range(20..70));
        self.facts.extend([
            ("hero", hero),
            ("he", he.into()),
            ("him", him.into()),
            ("his", his.into()),
            ("friend", friend),
            ("friend_he", friend_he.into()),
            ("friend_his", friend_his.into()),
            ("town", town),
            ("age", age),
        ]);
    }

    fn introduce_things(&mut self) {
        let rng = &mut self.rng;
        let mut packed: Vec<&str> = PACKED.choose_multiple(rng, 3).copied().collect();
        packed.shuffle(rng);
        let (morning, noon) = (rng.random_range(2..40), rng.random_range(2..40));
        let day = rng.random_range(0..DAYS.len());
        let season = rng.random_range(0..SEASONS.len());
        self.facts.extend([
            ("colour", pick(rng, COLOURS).to_string()),
            ("material", pick(rng, MATERIALS).to_string()),
            ("keepsake", pick(rng, KEEPSAKES).to_string()),
            ("price", number(rng.random_range(20..100))),
            ("first", packed[0].into()),
            ("second", packed[1].into()),
            ("third", packed[2].into()),
            ("morning", number(morning)),
            ("noon", number(noon)),
            ("sum", number(morning + noon)),
            ("day", DAYS[day].into()),
            ("next_day", DAYS[(day + 1) % DAYS.len()].into()),
            ("season", SEASONS[season].into()),
            ("next_season", SEASONS[(season + 1) % SEASONS.len()].into()),
        ]);
    }

    /// An opening, some paragraphs, and an end that recalls the beginning.
    fn write(mut self) -> String {
        let opening = self.paragraph(OPENING, 3);
        let mut paragraphs = vec![opening];
        let mut middle: Vec<&[&str]> = MIDDLE.to_vec();
        middle.shuffle(&mut self.rng);
        let count = self.rng.random_range(2..=5);
        for sentences in &middle[..count] {
            let others = self.rng.random_range(1..sentences.len());
            paragraphs.push(self.paragraph(sentences, others));
        }
        paragraphs.push(self.paragraph(END, 2));
        paragraphs.join("\n\n") + "\n"
    }

    /// The first of `templates` and `others` more of them, in their order.
    fn paragraph(&mut self, templates: &[&str], others: usize) -> String {
        let mut chosen =
            rand::seq::index::sample(&mut self.rng, templates.len() - 1, others).into_vec();
        chosen.sort_unstable();
        let chosen = std::iter::once(0).chain(chosen.into_iter().map(|i| i + 1));
        let sentences: Vec<String> = chosen.map(|i| self.fill(templates[i])).collect();
        sentences.join(" ")
    }

    /// Replaces every `{name}` of a template. A name that begins with a capital gives a capital
    /// letter, and `{a name}` adds the article.
    fn fill(&mut self, template: &str) -> String {
        let mut text = String::new();
        let mut rest = template;
        while let Some((before, after)) = rest.split_once('{') {
            let (slot, after) = after.split_once('}').unwrap_or((after, ""));
            text += before;
            let (article, slot) = match slot.split_once(' ') {
                Some((article, slot)) => (Some(article), slot),
                None => (None, slot),
            };
            let value = self.value(&slot.to_lowercase());
            let value = match article {
                Some(_) if value.starts_with(['a', 'e', 'i', 'o', 'u']) => format!("an {value}"),
                Some(_) => format!("a {value}"),
                None => value,
            };
            let capital = article.unwrap_or(slot).starts_with(char::is_uppercase);
            text += &if capital { capitalized(&value) } else { value };
            rest = after;
        }
        text + rest
    }

    /// A fact of the tale, or a word of its topic.
    fn value(&mut self, slot: &str) -> String {
        if let Some((_, value)) = self.facts.iter().find(|(name, _)| *name == slot) {
            return value.clone();
        }
        let rng = &mut self.rng;
        match slot {
            "noun" => pick(rng, self.topic.nouns).0.to_string(),
            "nouns" => pick(rng, self.topic.nouns).1.to_string(),
            "adjective" => pick(rng, self.topic.adjectives).to_string(),
            "did" => pick(rng, self.topic.verbs).to_string(),
            _ => unreachable!("templates hold known slots only, see the test"),
        }
    }
}

fn pick<'a, T>(rng: &mut ChaCha8Rng, from: &'a [T]) -> &'a T {
    &from[rng.random_range(0..from.len())]
}

/// A made-up name of two or three syllables.
fn name(rng: &mut ChaCha8Rng, ending: &str) -> String {
    let mut name = String::new();
    for _ in 0..rng.random_range(1..=2) {
        let syllable: &&str = pick(rng, SYLLABLES);
        name += syllable;
    }
    capitalized(&(name + ending))
}

/// A number below 100 in words.
fn number(n: usize) -> String {
    let tens = [
        "twenty", "thirty", "forty", "fifty", "sixty", "seventy", "eighty", "ninety",
    ];
    match (n / 10, n % 10) {
        (0 | 1, _) => NUMBERS[n].to_string(),
        (ten, 0) => tens[ten - 2].to_string(),
        (ten, one) => format!("{}-{}", tens[ten - 2], NUMBERS[one]),
    }
}

fn capitalized(word: &str) -> String {
    let mut letters = word.chars();
    letters.next().map_or(String::new(), |first| {
        first.to_uppercase().chain(letters).collect()
    })
}

#[cfg(test)]
mod tests {
    use std::collections::{HashMap, HashSet};

    use super::*;

    fn corpus(documents: usize, seed: u64) -> Corpus {
        Corpus { documents, seed }
    }

    fn tale(index: usize) -> Tale {
        Tale::new(ChaCha8Rng::seed_from_u64(index as u64))
    }

    #[test]
    fn every_template_is_filled() {
        for (i, template) in MIDDLE
            .iter()
            .copied()
            .chain([OPENING, END])
            .flatten()
            .enumerate()
        {
            let text = tale(i).fill(template);
            assert!(!text.contains(['{', '}']), "{text}");
            assert!(
                text.starts_with(|first: char| first.is_uppercase() || first == '"'),
                "{text}"
            );
            assert!(text.ends_with(['.', '"', '!', '?']), "{text}");
        }
    }

    #[test]
    fn articles_and_capitals_follow_the_slot() {
        let mut tale = tale(0);
        tale.facts
            .extend([("vowel", "oar".to_string()), ("other", "boat".to_string())]);
        let text = tale.fill("{a vowel}, {a other}, {A vowel}, {Other}");
        assert_eq!(text, "an oar, a boat, An oar, Boat");
    }

    #[test]
    fn numbers_are_words() {
        let numbers = [0, 7, 19, 20, 42, 78, 99].map(number);
        let expected = [
            "zero",
            "seven",
            "nineteen",
            "twenty",
            "forty-two",
            "seventy-eight",
            "ninety-nine",
        ];
        assert_eq!(numbers, expected);
    }

    #[test]
    fn a_tale_depends_on_seed_and_index_alone() {
        assert_eq!(corpus(10, 1).document(3), corpus(5, 1).document(3));
        assert_ne!(corpus(10, 1).document(3), corpus(10, 2).document(3));
        let tales: HashSet<String> = (0..200).map(|i| corpus(200, 1).document(i)).collect();
        assert_eq!(tales.len(), 200);
    }

    #[test]
    fn the_text_of_version_1_stays_as_it_is() {
        // Runs name the corpus by its version: with other text, raise VERSION.
        let text = corpus(1, 0).document(0);
        assert_eq!(
            xxhash_rust::xxh3::xxh3_64(text.as_bytes()),
            0x147f_333f_24ac_070c,
            "{text}"
        );
    }

    /// Entropy in bits of a word alone, and of a word after the one before it; and how many of
    /// the words that few tales have (names, mostly) were in the same tale before.
    #[test]
    fn context_tells_more_than_frequency() {
        let tales: Vec<Vec<String>> = (0..500).map(|i| words(&corpus(1, 0).document(i))).collect();
        let mut unigrams: HashMap<&str, f64> = HashMap::new();
        let mut bigrams: HashMap<(&str, &str), f64> = HashMap::new();
        for pair in tales.iter().flat_map(|words| words.windows(2)) {
            *unigrams.entry(&pair[1]).or_default() += 1.0;
            *bigrams.entry((&pair[0], &pair[1])).or_default() += 1.0;
        }
        let unigram = entropy(unigrams.values());
        let given_previous = entropy(bigrams.values()) - unigram;
        assert!(unigram > 7.0, "{unigram} bits: too monotonous");
        assert!(
            given_previous < unigram - 3.0,
            "{given_previous} against {unigram} bits"
        );

        let (mut rare, mut repeated) = (0, 0);
        for words in &tales {
            let mut seen = HashSet::new();
            for word in words
                .iter()
                .filter(|word| unigrams.get(word.as_str()) < Some(&20.0))
            {
                rare += 1;
                repeated += !seen.insert(word) as usize;
            }
        }
        assert!(
            2 * repeated > rare,
            "{repeated} of {rare} rare words were in the tale before"
        );
    }

    fn words(text: &str) -> Vec<String> {
        let words = text.split(|letter: char| !letter.is_alphabetic());
        words
            .filter(|word| !word.is_empty())
            .map(str::to_string)
            .collect()
    }

    fn entropy<'a>(counts: impl Iterator<Item = &'a f64> + Clone) -> f64 {
        let total: f64 = counts.clone().sum();
        counts.map(|n| -n / total * (n / total).log2()).sum()
    }
}
