//! What all corpora become before they are rows: threads of comments under a post, and dialogues without one.

use super::clean::{awards_delta, is_deleted};

/// Whether a comment changed a mind.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, strum::IntoStaticStr)]
#[strum(serialize_all = "snake_case")]
pub enum Result {
    /// It earned a delta, or the donation was made.
    Won,
    /// It is of a thread that earned none.
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
    /// What decides the side of a split: the post, or the dialogue.
    pub id: String,
    /// The post's title; empty if there is none.
    pub title: String,
    /// The post's text; empty for a dialogue.
    pub post: String,
    /// The author of the post; in a dialogue whoever is to be persuaded.
    pub op: String,
    /// The comments; a parent may stand after its children.
    pub comments: Vec<Comment>,
}

/// A comment, or a turn of a dialogue.
#[derive(Clone, Debug, Default)]
pub struct Comment {
    /// Its id in the corpus.
    pub id: String,
    /// Its author's.
    pub author: String,
    /// Its text, as it is in the corpus.
    pub text: String,
    /// What it answers.
    pub parent: Parent,
    /// Whether it changed a mind.
    pub result: Result,
    /// The pairs that the corpus puts it in.
    pub pairs: Vec<String>,
}

/// What a comment answers.
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
    /// The comments above one, the first of them first; `None` if one of them is missing or deleted, or where they
    /// answer each other in a circle.
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

    /// The comment that begins the chain of one.
    pub fn root(&self, index: usize) -> Option<usize> {
        Some(self.above(index)?.first().copied().unwrap_or(index))
    }

    /// Narrows what won to the comments that the post's author answered with a delta, in each chain that has one: the
    /// corpora mark whole chains.
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
