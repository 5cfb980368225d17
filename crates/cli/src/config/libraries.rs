//! The configuration as the libraries take it.

use super::table::Config;
use suasion_data::Policy;
use suasion_train::Settings;

impl Config {
    /// The choices that decide labels. An empty marker removes its section.
    pub fn policy(&self) -> Policy {
        let mut policy = self.data.clone();
        policy.section_markers.retain(|_, marker| !marker.is_empty());
        policy
    }

    /// The settings of the training loop. A `max_steps` of -1, the Trainer's value for "by epochs", becomes
    /// `None`.
    pub fn settings(&self) -> Settings {
        Settings { max_steps: u64::try_from(self.max_steps).ok(), ..self.train.clone() }
    }
}
