//! An attention plan in the form that the kernels read; `README.md` explains the numbers.

use crate::kernels::AttentionPlan;

/// Queries or keys per tile.
const TILE: usize = 64;

/// The lists of a plan.
#[derive(Debug, Default)]
pub(super) struct Tiles {
    pub(super) tiles: Vec<[u32; 8]>,
    pub(super) key_tiles: Vec<[u32; 4]>,
    pub(super) entries: Vec<[u32; 8]>,
}

impl Tiles {
    /// The lists of a checked plan with fewer than 2³² rows and keys.
    pub(super) fn of(plan: &AttentionPlan) -> Tiles {
        let mut lists = Tiles::default();
        for range in &plan.ranges {
            let (prefix, own) = (&range.prefix, range.own.start);
            for first in range.queries.clone().step_by(TILE) {
                let count = TILE.min(range.queries.end - first);
                lists.tiles.push([first, count, prefix.start, prefix.len(), own, 0, 0, 0].map(|n| n as u32));
            }
        }
        // Between two adjacent ends of runs of keys, all keys are seen by the same ranges.
        let mut ends: Vec<usize> = vec![0, plan.keys()];
        for range in &plan.ranges {
            ends.extend([range.prefix.start, range.prefix.end, range.own.start, range.own.end]);
        }
        ends.retain(|end| *end <= plan.keys());
        ends.sort_unstable();
        ends.dedup();
        for pair in ends.windows(2) {
            for first in (pair[0]..pair[1]).step_by(TILE) {
                let count = TILE.min(pair[1] - first);
                let before = lists.entries.len();
                for range in &plan.ranges {
                    let own = &range.own;
                    let queries = &plan.rows[range.queries.clone()];
                    let (skipped, place) = if range.prefix.contains(&first) {
                        (0, first - range.prefix.start)
                    } else if own.contains(&first) {
                        let earlier = queries.partition_point(|row| (*row as usize) < first);
                        (earlier, range.prefix.len() + first - own.start)
                    } else {
                        continue;
                    };
                    let (start, left) = (range.queries.start + skipped, queries.len() - skipped);
                    if left > 0 {
                        let entry = [start, left, place, range.prefix.len(), own.start, 0, 0, 0];
                        lists.entries.push(entry.map(|n| n as u32));
                    }
                }
                lists.key_tiles.push([first, count, before, lists.entries.len()].map(|n| n as u32));
            }
        }
        lists
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::kernels::AttentionRange;

    /// Every query of a plan is paired with each key that it sees exactly once, both through tiles of queries and
    /// through tiles of keys.
    #[test]
    fn tiles_cover_what_a_plan_says() {
        let range = |prefix, own: std::ops::Range<usize>, queries| AttentionRange { prefix, own, queries };
        let rows: Vec<u32> = (0..70).chain(70..150).chain([190, 200, 209]).chain(210..212).collect();
        let ranges = vec![
            range(0..0, 0..70, 0..70),
            range(0..70, 70..150, 70..150),
            range(0..70, 150..210, 150..153),
            range(0..0, 210..300, 153..155),
        ];
        let plan = AttentionPlan { rows, ranges, groups: vec![vec![0, 1, 2], vec![3]] };
        plan.check().unwrap();
        let lists = Tiles::of(&plan);
        let mut expected = Vec::new();
        for range in &plan.ranges {
            for query in range.queries.clone() {
                let own = range.own.start..plan.rows[query] as usize + 1;
                for (place, key) in range.prefix.clone().chain(own).enumerate() {
                    expected.push((query, key, place));
                }
            }
        }
        let of_queries: Vec<_> = lists
            .tiles
            .iter()
            .flat_map(|tile| {
                let [first, count, prefix, prefix_len, own] = std::array::from_fn(|i| tile[i] as usize);
                let rows = &plan.rows;
                (first..first + count).flat_map(move |query| {
                    let keys = (prefix..prefix + prefix_len).chain(own..rows[query] as usize + 1);
                    keys.enumerate().map(move |(place, key)| (query, key, place)).collect::<Vec<_>>()
                })
            })
            .collect();
        assert_eq!(of_queries, expected);
        let mut of_keys = Vec::new();
        let mut next = 0;
        for tile in &lists.key_tiles {
            let [first, count, start, end] = tile.map(|n| n as usize);
            assert_eq!((first, (1..=TILE).contains(&count)), (next, true));
            next += count;
            for entry in &lists.entries[start..end] {
                let [query, queries, place, prefix_len, own] = std::array::from_fn(|i| entry[i] as usize);
                for query in query..query + queries {
                    let of_query = prefix_len + plan.rows[query] as usize - own;
                    for (n, key) in (first..first + count).enumerate().filter(|(n, _)| place + n <= of_query)
                    {
                        of_keys.push((query, key, place + n));
                    }
                }
            }
        }
        assert_eq!(next, plan.keys());
        of_keys.sort_unstable();
        assert_eq!(of_keys, expected);
    }
}
