//! Damaged files of a run: errors are fine, panics are not.

use crate::common::*;
use suasion_test_support::fuzz::run;
use suasion_train::Settings;
use suasion_train::checkpoint;

/// The state of a checkpoint, and metrics.
#[test]
fn states_and_metrics() {
    let (train, (_dir, out)) = (rows(4, 1), folder());
    let settings = Settings {
        max_steps: Some(2),
        save_steps: 2.into(),
        save_strategy: suasion_train::Strategy::Steps,
        ..quick()
    };
    Job::new(&train, settings, &out).run().unwrap();
    let place = out.join("checkpoint-2");
    let inputs = [bytes(place.join(checkpoint::STATE)), bytes(place.join(checkpoint::METRICS))];
    run("states", &inputs, |bytes| {
        std::fs::write(place.join(checkpoint::STATE), bytes).unwrap();
        let _ = checkpoint::read(&place);
        let _ = suasion_train::metrics::read(&place.join(checkpoint::STATE));
    });
}
