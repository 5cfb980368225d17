//! Configurations, with valid inputs: damaged here, and fuzzed by the targets in `fuzz/`.

use suasion_cli::embed;
use suasion_test_support::fuzz::{Parser, reached};
use tempfile::TempDir;

/// Configuration files, as YAML and as TOML.
pub struct Keys(TempDir);

impl Parser for Keys {
    const NAME: &'static str = "keys";
    const KINDS: usize = 2;

    fn seeds() -> Vec<(usize, Vec<u8>)> {
        let yaml = "# A run.\nmodel_name_or_path: model\ndataset_name: [rows.jsonl, 'more.jsonl']\ninit: random\nmax_steps: 2\n\
                    learning_rate: 1e-4\nlr_scheduler_type: cosine\nlr_scheduler_kwargs: {num_cycles: 0.75}\nsave_steps: 0.1\n\
                    section_markers:\n  TASK: '[TASK]'\nloss_weights: &w {system: 0.1}\nsave_strategy: 'no'\nuse_peft: true\n\
                    lora_target_modules: all-linear\nlora_rank_pattern: {q_proj: 4}\nallow_findings: [M001]\n";
        let other = "adam_beta1: .9\nseed: 0x10\neval_strategy: steps\nbf16: yes\npacking: false\nstop_tokens: |\n  x\n  y\n\
                     param_groups:\n- {match: norm, learning_rate: 1}\n";
        let toml = "model_name_or_path = \"model\"\ndataset_name = [\"rows.jsonl\"]\nmax_steps = 2\nlearning_rate = 1e-4\n\
                    [section_markers]\nTASK = \"[TASK]\"\n[loss_weights]\nsystem = 0.1\n";
        vec![(0, yaml.into()), (0, other.into()), (1, toml.into())]
    }

    fn new() -> Keys {
        Keys(tempfile::tempdir().expect("a folder"))
    }

    fn parse(&mut self, kind: usize, bytes: &[u8]) {
        let path = self.0.path().join(["x.yaml", "x.toml"][kind]);
        std::fs::write(&path, bytes).expect("written");
        reached(embed::configuration(&path));
    }
}

#[cfg(test)]
#[test]
fn damaged_configurations_are_refused() {
    suasion_test_support::fuzz::run::<Keys>();
}
