//! Finds the turns of a chat template in token ids.
//!
//! Proofs over small conversations show which tokens belong to which message, for this template and tokenizer
//! ([`derive`]). This gives the ids before each message (its header), and the ids that end an answer. The headers
//! are then searched for in any row, in one pass: an id that does not begin a header, end an answer or close a
//! prompt costs one table look-up. Before a finder is used, it must find every turn of the conversations that it
//! was derived from.

mod derive;

use super::foreign::{Part, Restart, WrittenStops};
use crate::{Origin, Section};
use std::ops::Range;

/// The turns of a template, as ids.
#[derive(Clone, Debug, Default)]
pub struct Turns {
    /// Flags of each id: [`OPENS`], [`STOPS`], [`CLOSES`], [`BEGINS`].
    flags: Vec<u8>,
    /// Headers, longest first.
    openers: Vec<Opener>,
    /// Ids that end the texts of prompts.
    closers: Vec<(Kind, u32)>,
    /// Ids at the start of conversations.
    starts: Vec<u32>,
    written: WrittenStops,
    /// The ends of answers: usually one id, several if the tokenizer treats a stop token as text.
    stops: Vec<Vec<u32>>,
    headers: Option<(String, String)>,
}

/// The id starts a header.
const OPENS: u8 = 1;
/// It ends an answer (or is the first id of such an end).
const STOPS: u8 = 2;
/// It ends the text of a prompt.
const CLOSES: u8 = 4;
/// It is the BOS of a template that writes BOS only at the start.
const BEGINS: u8 = 8;

/// Between two answers without a recognised prompt header, at most this many tokens are a separator; more are a
/// prompt whose header cannot be told from text.
const UNNAMED: usize = 4;

/// The author of a message.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
enum Kind {
    Answer,
    System,
    User,
    Tool,
    /// A prompt whose header does not determine its role.
    Prompt,
}

impl Kind {
    fn of(origin: Origin) -> Option<Kind> {
        match origin {
            Origin::Response { .. } => Some(Kind::Answer),
            Origin::Prompt { section: Section::System, .. } => Some(Kind::System),
            Origin::Prompt { section: Section::Context | Section::User | Section::Task, .. } => {
                Some(Kind::User)
            }
            Origin::Prompt { section: Section::Tool, .. } => Some(Kind::Tool),
            Origin::Prompt { section: Section::Other, .. } => Some(Kind::Prompt),
            Origin::Scaffold | Origin::EndOfTurn { .. } | Origin::Padding => None,
        }
    }
}

/// The header of a message.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Opener {
    ids: Vec<u32>,
    kind: Kind,
    /// It begins with a structural token, which text cannot produce.
    structural: bool,
    /// The message begins exactly after it; otherwise the message's first token may include the end of the header.
    exact: bool,
}

/// The turns of a row.
#[derive(Clone, Debug)]
pub struct Found {
    /// The origin of each token.
    pub origins: Vec<Origin>,
    /// Other facts about the row.
    pub part: Part,
}

/// The state of a scan.
#[derive(Clone, Copy, PartialEq)]
enum State {
    /// Before the first header.
    Head,
    /// After a message and before the next header.
    Between,
    /// In a message.
    In(Kind),
}

impl Turns {
    /// Which stop tokens the template writes.
    pub fn written(&self) -> WrittenStops {
        self.written
    }

    /// The texts before a user's message and before an answer.
    pub fn headers(&self) -> Option<(&str, &str)> {
        self.headers.as_ref().map(|(user, answer)| (user.as_str(), answer.as_str()))
    }

    fn flags(&self, id: u32) -> u8 {
        self.flags.get(id as usize).copied().unwrap_or(0)
    }

    /// The length of the end of an answer at the start of these ids; 0 if there is none.
    fn stop(&self, ids: &[u32]) -> usize {
        let fitting = self.stops.iter().filter(|stop| ids.starts_with(stop));
        fitting.map(Vec::len).max().unwrap_or(0)
    }

    /// The header at the start of these ids, and the length of the shortest one of the same kind.
    fn opener(&self, ids: &[u32]) -> Option<(&Opener, usize)> {
        let mut fitting = self.openers.iter().filter(|opener| ids.starts_with(&opener.ids));
        let longest = fitting.next()?;
        let shorter = fitting.rfind(|other| other.kind == longest.kind && other.exact);
        Some((longest, shorter.map_or(longest.ids.len(), |other| other.ids.len())))
    }

    /// The turns of a row; `None` if it contains no header. `real` is false on padding. `learned` decides what ids
    /// cannot determine: the text before the first header of a row that begins inside a message, and tokens of an
    /// answer that some generation prompts contain. Also `None` if an answer seems to have no header.
    pub fn find(
        &self,
        ids: &[u32],
        real: impl Fn(usize) -> bool,
        learned: impl Fn(usize) -> bool,
    ) -> Option<Found> {
        let start = (0..ids.len()).find(|&i| real(i))?;
        let end = (start..ids.len()).rfind(|&i| real(i)).map_or(start, |i| i + 1);
        let mut scan = Scan {
            origins: vec![Origin::Padding; ids.len()],
            part: Part { known: true, ..Part::default() },
            state: State::Head,
            from: start,
            turn: 0,
            users: Vec::new(),
            systems: Vec::new(),
            unanswered: None,
            prompted: false,
        };
        let mut missed = false;
        let mut i = start;
        let mut opened = false;
        while i < end {
            let flags = self.flags(ids[i]);
            if flags == 0 {
                i += 1;
                continue;
            }
            // A second BOS at the very start is a different fault (M006).
            if flags & BEGINS != 0 && i > start + 1 {
                scan.close(i, &learned, |i| self.flags(ids[i]) & STOPS != 0, State::Between);
                scan.part.restarts.push(Restart { at: i, sure: true });
                i += 1;
                continue;
            }
            let mut from = i;
            if flags & STOPS != 0
                && scan.state == State::In(Kind::Answer)
                && let length @ 1.. = self.stop(&ids[i..end])
            {
                scan.close(i, &learned, |_| false, State::Between);
                scan.origins[i..i + length].fill(Origin::EndOfTurn { turn: scan.turn });
                from = i + length;
                scan.from = from;
            }
            if flags & OPENS != 0
                && let Some((opener, least)) = self.opener(&ids[i..end])
                && (scan.state != State::In(Kind::Answer) || opener.structural || !self.written.any)
            {
                if !opened {
                    scan.part.inside = !self.is_start(&ids[start..]);
                    opened = true;
                } else if opener.kind == Kind::System {
                    scan.systems.push((i, i));
                }
                if from == i {
                    let (run, state) = (scan.from..i, scan.state);
                    scan.close(i, &learned, |i| self.flags(ids[i]) & STOPS != 0, State::In(opener.kind));
                    let outside = state == State::Between || state == State::Head && !scan.part.inside;
                    if opener.kind == Kind::Answer && outside && !scan.prompted && run.len() > UNNAMED {
                        let section = Section::Other;
                        scan.origins[run.start + 2..run.end]
                            .fill(Origin::Prompt { turn: scan.turn, section });
                    }
                    scan.turn = scan.turn.saturating_add(1);
                } else {
                    scan.state = State::In(opener.kind);
                    scan.turn = scan.turn.saturating_add(1);
                }
                scan.prompted = opener.kind != Kind::Answer;
                match scan.unanswered.take() {
                    Some(run) if opener.kind != Kind::Answer => missed |= is_answer(run, &learned),
                    _ => {}
                }
                // A stop token may also begin the next header.
                let after = (i + opener.ids.len()).max(from);
                scan.origins[from..after].fill(Origin::Scaffold);
                if opener.kind == Kind::Answer {
                    for at in (i + least..after).filter(|&at| learned(at)) {
                        scan.origins[at] = Origin::Response { turn: scan.turn };
                    }
                }
                (i, scan.from) = (after, after);
                continue;
            }
            if flags & CLOSES != 0
                && let State::In(kind) = scan.state
                && self.closers.contains(&(kind, ids[i]))
            {
                scan.close(i, &learned, |_| false, State::Between);
            }
            i = from.max(i + 1);
        }
        scan.close(end, &learned, |i| self.flags(ids[i]) & STOPS != 0, State::Between);
        missed |= scan.unanswered.take().is_some_and(|run| is_answer(run, &learned));
        if !opened || missed {
            return None;
        }
        scan.finish(ids);
        // Padding inside or at the ends.
        for i in (0..ids.len()).filter(|&i| !real(i)) {
            scan.origins[i] = Origin::Padding;
        }
        Some(Found { origins: scan.origins, part: scan.part })
    }

    /// True if a conversation can begin with these ids, perhaps without its BOS.
    fn is_start(&self, ids: &[u32]) -> bool {
        ids.first().is_none_or(|id| self.starts.contains(id))
    }
}

/// True if a prompt without an answer is supervised from some point to its end: it may contain an answer with an
/// unknown header.
fn is_answer(run: Range<usize>, learned: impl Fn(usize) -> bool) -> bool {
    /// The maximal number of unsupervised tokens after such an answer.
    const AFTER: usize = 8;
    let first = run.clone().find(|&i| learned(i));
    let end = run.end.saturating_sub(AFTER)..run.end;
    first.is_some_and(|first| first > run.start && end.clone().any(|i| i >= first && learned(i)))
}

/// The state of [`Turns::find`].
struct Scan {
    origins: Vec<Origin>,
    part: Part,
    state: State,
    /// The first token of the current part.
    from: usize,
    turn: u16,
    users: Vec<Range<usize>>,
    /// System messages after the first message: the positions of the header and of the end.
    systems: Vec<(usize, usize)>,
    /// The last user message, until an answer follows.
    unanswered: Option<Range<usize>>,
    /// A prompt header was found after that of the last answer.
    prompted: bool,
}

impl Scan {
    /// Ends the current part before token `at`.
    fn close(
        &mut self,
        at: usize,
        learned: impl Fn(usize) -> bool,
        stops: impl Fn(usize) -> bool,
        next: State,
    ) {
        let (run, turn) = (self.from..at, self.turn);
        let prompt = |section| Origin::Prompt { turn, section };
        match self.state {
            State::Head if self.part.inside => {
                for i in run {
                    self.origins[i] = match (learned(i), stops(i)) {
                        (true, true) => Origin::EndOfTurn { turn },
                        (true, false) => Origin::Response { turn },
                        (false, _) => prompt(Section::Other),
                    };
                }
            }
            State::Head | State::Between => self.origins[run].fill(Origin::Scaffold),
            State::In(Kind::Answer) => self.origins[run].fill(Origin::Response { turn }),
            State::In(Kind::System) => {
                if let Some(last) = self.systems.last_mut().filter(|last| last.0 == last.1) {
                    last.1 = at;
                }
                self.origins[run].fill(prompt(Section::System));
            }
            State::In(Kind::Tool) => self.origins[run].fill(prompt(Section::Tool)),
            State::In(Kind::Prompt) => {
                self.unanswered = Some(run.clone());
                self.origins[run].fill(prompt(Section::Other));
            }
            State::In(Kind::User) => {
                self.unanswered = Some(run.clone());
                self.users.push(run.clone());
                self.origins[run].fill(prompt(Section::Context));
            }
        }
        (self.state, self.from) = (next, at);
    }

    /// Resolves what is only known at the end: which user message is the last, and whether a later system message
    /// repeats the first.
    fn finish(&mut self, ids: &[u32]) {
        if let Some(last) = self.users.last() {
            for origin in &mut self.origins[last.clone()] {
                if let Origin::Prompt { section, .. } = origin {
                    *section = Section::User;
                }
            }
        }
        let is_system = |origin: &Origin| matches!(origin, Origin::Prompt { section: Section::System, .. });
        let Some(first) = self.origins.iter().position(is_system) else { return };
        let length = self.origins[first..].iter().take_while(|origin| is_system(origin)).count();
        for (opened, end) in &self.systems {
            let own = (*opened..*end).find(|&i| is_system(&self.origins[i]));
            // A system message may also occur inside a conversation.
            if let Some(own) = own.filter(|own| *own > first)
                && ids[own..*end] == ids[first..first + length]
                && !self.part.restarts.iter().any(|restart| restart.at < own && own - restart.at < 16)
            {
                self.part.restarts.push(Restart { at: *opened, sure: true });
            }
        }
    }
}
