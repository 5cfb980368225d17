//! The tree as the libraries take it.

use super::table::Config;
use suasion_data::policy::Policy;
use suasion_train::Settings;

impl Config {
    /// The choices that decide labels. An empty marker takes its section out.
    pub fn policy(&self) -> Policy {
        let mut policy = self.data.clone();
        policy.section_markers.retain(|_, marker| !marker.is_empty());
        policy
    }

    /// The settings of the training loop. `max_steps` of -1, the Trainer's way to say "by epochs", is `None`.
    pub fn settings(&self) -> Settings {
        Settings { max_steps: u64::try_from(self.max_steps).ok(), ..self.train.clone() }
    }
}
