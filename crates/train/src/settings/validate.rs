//! Settings that cannot work, alone or together.

use super::{KEYS, Optim, Settings, Strategy, momentum};
use crate::evaluate::{METRICS, is_metric};
use crate::{Error, Result};

impl Settings {
    /// Refuses values, and combinations of values, that cannot work. `has_eval`: the run has rows to evaluate
    /// on.
    pub fn validate(&self, has_eval: bool) -> Result<()> {
        for key in KEYS {
            if let (Some(range), Some(number)) = (key.range, (key.number)(self))
                && !range.holds(number)
            {
                return Err(Error::out_of_bounds(key.name, key.value(self), &range.to_string()));
            }
        }
        if let Some(text) = &self.optim_args
            && (self.optim != Optim::Sgd || momentum(text).is_none())
        {
            let problem = format!("is not an argument of {}", self.optim);
            let help = "sgd takes momentum=0.9, at least 0 and below 1; adam_beta1, adam_beta2, adam_epsilon and \
                        weight_decay are keys of their own";
            return Err(Error::setting("optim_args", text, problem, help));
        }
        if self.learning_rate == 0.0 && self.param_groups.iter().any(|group| group.learning_rate > Some(0.0))
        {
            let problem = "has no schedule that a group of param_groups could follow";
            let help = "set it to the rate of most parameters, and freeze those that must not change";
            return Err(Error::setting("learning_rate", self.learning_rate, problem, help));
        }
        for group in &self.param_groups {
            let rates = [group.learning_rate, group.weight_decay];
            if rates.iter().flatten().any(|rate| !(rate.is_finite() && *rate >= 0.0)) || rates == [None, None]
            {
                let help = "each group needs match and learning_rate or weight_decay, both at least 0";
                let shown = serde_json::json!(group);
                return Err(Error::setting("param_groups", shown, "is not possible", help));
            }
        }
        self.schedule(1)?;
        let Settings { eval_strategy, save_strategy, .. } = *self;
        if eval_strategy == Strategy::Best {
            let problem = "applies to checkpoints only";
            return Err(Error::setting("eval_strategy", eval_strategy, problem, "use no, steps or epoch"));
        }
        if eval_strategy != Strategy::No && !has_eval {
            let problem = "needs rows to evaluate on, and there are none";
            return Err(Error::setting(
                "eval_strategy",
                eval_strategy,
                problem,
                "name a held-out split, or use no",
            ));
        }
        if save_strategy == Strategy::Best && eval_strategy == Strategy::No {
            let problem = "needs evaluations during training";
            return Err(Error::setting(
                "save_strategy",
                save_strategy,
                problem,
                "set eval_strategy to steps or epoch",
            ));
        }
        if self.load_best_model_at_end && [eval_strategy, save_strategy].contains(&Strategy::No) {
            return Err(Error::setting(
                "load_best_model_at_end",
                true,
                format!(
                    "needs evaluations and checkpoints, but eval_strategy is {eval_strategy} and save_strategy is \
                     {save_strategy}"
                ),
                "set both to steps or epoch, or save_strategy to best; they need not be the same",
            ));
        }
        if !is_metric(self.metric()) {
            return Err(Error::setting(
                "metric_for_best_model",
                self.metric(),
                "is not a metric of an evaluation",
                format!("use one of {}, or SECTION_loss, such as response_loss", METRICS.join(", ")),
            ));
        }
        let needs_evaluations = [
            ("early_stopping_patience", self.early_stopping_patience.map(|n| n.to_string())),
            (
                "lr_scheduler_type",
                Some(self.lr_scheduler_type)
                    .filter(|kind| kind.follows_evaluations())
                    .map(|kind| kind.to_string()),
            ),
        ];
        for (key, value) in needs_evaluations {
            if let (Some(value), Strategy::No) = (value, eval_strategy) {
                let help = "set eval_strategy to steps or epoch, and name rows to evaluate on";
                return Err(Error::setting(key, value, "needs evaluations during training", help));
            }
        }
        Ok(())
    }
}
