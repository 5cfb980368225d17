//! The configuration as the libraries take it.

use super::table::Config;
use std::path::PathBuf;
use suasion_data::Policy;
use suasion_train::Settings;

impl Config {
    /// The same, with the paths of what it reads as they are from any folder. Hub ids stay.
    pub fn anywhere(&self) -> Config {
        let mut config = self.clone();
        let absolute = |path: &mut PathBuf| {
            let is_pattern = path.to_string_lossy().contains(['*', '?', '[']);
            if path.exists() || is_pattern {
                *path = std::path::absolute(&*path).unwrap_or_else(|_| path.clone());
            }
        };
        config.model_name_or_path.iter_mut().chain(&mut config.adapter_name_or_path).for_each(absolute);
        let data = [&mut config.dataset_name, &mut config.eval_dataset_name];
        data.into_iter().flatten().flat_map(|paths| &mut paths.0).for_each(absolute);
        config
    }

    /// The same, with file names instead of absolute paths: for others to read.
    pub fn shareable(&self) -> Config {
        let mut config = self.clone();
        let short = |path: &mut PathBuf| {
            if let (true, Some(name)) = (path.is_absolute(), path.file_name()) {
                *path = name.into();
            }
        };
        let models = config.model_name_or_path.iter_mut().chain(&mut config.adapter_name_or_path);
        models.chain([&mut config.output_dir]).for_each(short);
        let data = [&mut config.dataset_name, &mut config.eval_dataset_name];
        data.into_iter().flatten().flat_map(|paths| &mut paths.0).for_each(short);
        config
    }

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
