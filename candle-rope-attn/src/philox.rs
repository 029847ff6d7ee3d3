//! Philox4x32-10 (Salmon et al. 2011, <https://doi.org/10.1145/2063384.2063405>): random numbers
//! as a function of a counter, so that forward, backward and every device draw the same.

use crate::spec::Dropout;

/// `N` blocks of four random words, one for each counter.
#[inline(always)]
pub(crate) fn philox4x32<const N: usize>(
    counter: [[u32; N]; 4],
    mut key: [u32; 2],
) -> [[u32; N]; 4] {
    let [mut x0, mut x1, mut x2, mut x3] = counter;
    for _ in 0..10 {
        for i in 0..N {
            let a = 0xD251_1F53 * u64::from(x0[i]);
            let b = 0xCD9E_8D57 * u64::from(x2[i]);
            x0[i] = (b >> 32) as u32 ^ x1[i] ^ key[0];
            x1[i] = b as u32;
            x2[i] = (a >> 32) as u32 ^ x3[i] ^ key[1];
            x3[i] = a as u32;
        }
        key[0] = key[0].wrapping_add(0x9E37_79B9);
        key[1] = key[1].wrapping_add(0xBB67_AE85);
    }
    [x0, x1, x2, x3]
}

/// [`Dropout`] as a comparison of random words.
#[derive(Debug, Clone, Copy)]
pub(crate) struct DropoutMask {
    key: [u32; 2],
    /// Words below it drop their element.
    threshold: u32,
    /// Factor on kept elements, `1 / (1 - p)`.
    pub scale: f32,
}

impl DropoutMask {
    pub fn new(dropout: Dropout) -> Self {
        Self {
            key: [dropout.seed as u32, (dropout.seed >> 32) as u32],
            threshold: (f64::from(dropout.p) * 2f64.powi(32)).ceil() as u32,
            scale: 1.0 / (1.0 - dropout.p),
        }
    }

    /// Whether each element of keys `4 * key_group..4 * key_group + 4` and queries
    /// `first_query..first_query + N` is kept.
    #[inline(always)]
    pub fn keeps<const N: usize>(
        &self,
        [sequence, head]: [usize; 2],
        first_query: usize,
        key_group: usize,
    ) -> [[bool; N]; 4] {
        let queries = std::array::from_fn(|lane| (first_query + lane) as u32);
        let counter = [
            [key_group as u32; N],
            queries,
            [head as u32; N],
            [sequence as u32; N],
        ];
        self.keeps_at(counter)
    }

    /// Whether each element of groups `first_group..first_group + N` of four elements in a row is
    /// kept, for a tensor whose elements are numbered through: the counter is the group.
    #[inline(always)]
    pub fn keeps_elements<const N: usize>(&self, first_group: u64) -> [[bool; N]; 4] {
        let groups: [u64; N] = std::array::from_fn(|lane| first_group + lane as u64);
        let counter = [
            groups.map(|group| group as u32),
            groups.map(|group| (group >> 32) as u32),
            [0; N],
            [0; N],
        ];
        self.keeps_at(counter)
    }

    #[inline(always)]
    fn keeps_at<const N: usize>(&self, counter: [[u32; N]; 4]) -> [[bool; N]; 4] {
        philox4x32(counter, self.key).map(|words| words.map(|word| word >= self.threshold))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The known answers that the authors ship with Random123 (`kat_vectors`).
    #[test]
    fn known_answers() {
        let answer = |counter: [u32; 4], key| philox4x32(counter.map(|word| [word]), key);
        assert_eq!(
            answer([0; 4], [0; 2]),
            [[0x6627_e8d5], [0xe169_c58d], [0xbc57_ac4c], [0x9b00_dbd8]]
        );
        assert_eq!(
            answer([u32::MAX; 4], [u32::MAX; 2]),
            [[0x408f_276d], [0x41c8_3b0e], [0xa20b_c7c6], [0x6d54_51fd]]
        );
        assert_eq!(
            answer(
                [0x243f_6a88, 0x85a3_08d3, 0x1319_8a2e, 0x0370_7344],
                [0xa409_3822, 0x299f_31d0]
            ),
            [[0xd16c_fe09], [0x94fd_cceb], [0x5001_e420], [0x2412_6ea1]]
        );
    }
}
