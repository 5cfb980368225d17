//! The common form of all corpora before conversion to rows: threads of comments below a post, and dialogues
//! without one.

use super::clean::{awards_delta, is_deleted};

/// Whether a comment changed someone's mind.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, strum::IntoStaticStr)]
#[strum(serialize_all = "snake_case")]
pub enum Result {
    /// It earned a delta, or the donation was made.
    Won,
    /// Its thread earned none.
    Lost,
    /// The corpus does not say.
    #[default]
    Unknown,
}

impl Result {
    /// The name in rows.
    pub fn name(self) -> &'static str {
        self.into()
    }
}

/// A post with its comments, or a dialogue.
#[derive(Clone, Debug, Default)]
pub struct Thread {
    /// The unit of the split: the post, or the dialogue.
    pub id: String,
    /// The post's title; empty if there is none.
    pub title: String,
    /// The post's text; empty for a dialogue.
    pub post: String,
    /// The author of the post; in a dialogue the person to be persuaded.
    pub op: String,
    /// The comments; a parent may come after its children.
    pub comments: Vec<Comment>,
}

/// A comment, or a turn of a dialogue.
#[derive(Clone, Debug, Default)]
pub struct Comment {
    /// Its id in the corpus.
    pub id: String,
    /// Its author's id.
    pub author: String,
    /// Its text, as it is in the corpus.
    pub text: String,
    /// The post or comment that it answers.
    pub parent: Parent,
    /// Whether it changed someone's mind.
    pub result: Result,
    /// The pairs that the corpus assigns it to.
    pub pairs: Vec<String>,
}

/// The parent of a comment.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Parent {
    /// The post, or nothing.
    #[default]
    Post,
    /// The comment at this index.
    Comment(usize),
    /// A comment that the corpus lacks.
    Missing,
}

impl Thread {
    /// The ancestors of a comment, the first comment first; `None` if one of them is missing or deleted, or if
    /// they form a cycle.
    pub fn above(&self, index: usize) -> Option<Vec<usize>> {
        let mut path = Vec::new();
        let mut at = self.comments[index].parent;
        loop {
            match at {
                Parent::Post => break,
                Parent::Missing => return None,
                Parent::Comment(parent) => {
                    if path.len() > self.comments.len() || is_deleted(&self.comments[parent].text) {
                        return None;
                    }
                    path.push(parent);
                    at = self.comments[parent].parent;
                }
            }
        }
        path.reverse();
        Some(path)
    }

    /// The comment that begins the chain of a comment.
    pub fn root(&self, index: usize) -> Option<usize> {
        Some(self.above(index)?.first().copied().unwrap_or(index))
    }

    /// Restricts winners to the comments that the post's author answered with a delta, in each chain that has one:
    /// the corpora mark whole chains.
    pub fn narrow_to_deltas(&mut self) {
        let awarded: Vec<usize> = (self.comments.iter())
            .filter(|comment| comment.author == self.op && awards_delta(&comment.text))
            .filter_map(|comment| match comment.parent {
                Parent::Comment(parent) if self.comments[parent].author != self.op => Some(parent),
                _ => None,
            })
            .collect();
        let roots: Vec<Option<usize>> = (0..self.comments.len()).map(|i| self.root(i)).collect();
        for index in 0..self.comments.len() {
            let decided = |other: &usize| {
                self.comments[*other].result == Result::Won
                    && roots[*other].is_some()
                    && roots[*other] == roots[index]
            };
            if self.comments[index].result == Result::Won
                && !awarded.contains(&index)
                && awarded.iter().any(decided)
            {
                self.comments[index].result = Result::Unknown;
            }
        }
    }
}
