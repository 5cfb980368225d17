//! One optimizer step: micro-batches in, changed weights out.

use crate::batches::{row_at, row_ids, train_batch};
use crate::groups::ParamGroup;
use crate::rng::{Purpose, Rng};
use crate::{Error, Result, Settings};
use std::borrow::Cow;
use suasion_data::Sample;
use suasion_engine::{Backend, Collective, Model, Prepared, Rates, Regularisation, Update};

/// What a step did.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct StepOutcome {
    /// `Σ w·nll / Σ w` over the step's targets (smoothed, with `label_smoothing_factor`), before its update; `None` if the weights sum to zero.
    pub loss: Option<f64>,
    /// L2 norm of the gradient, before clipping.
    pub grad_norm: f64,
    /// Targets of the step.
    pub targets: u64,
    /// Tokens computed.
    pub tokens: u64,
    /// Share of the targets that the model predicts as the likeliest token; `None` without a target.
    pub mean_token_accuracy: Option<f64>,
    /// Mean entropy in nats of the distributions that they are predicted from.
    pub entropy: Option<f64>,
    /// Mean load-balancing loss of the micro-batches, which `loss` includes with its factor; `None` without one.
    pub aux_loss: Option<f64>,
}

/// The factor that `torch.nn.utils.clip_grad_norm_` applies: `min(1, max_norm / (norm + 1e-6))`; 1 where `max_norm`
/// is 0 (off).
pub fn clip_coefficient(max_norm: f64, norm: f64) -> f64 {
    if max_norm == 0.0 { 1.0 } else { (max_norm / (norm + 1e-6)).min(1.0) }
}

/// The micro-batches of a step as the engine takes them.
#[derive(Clone, Debug)]
pub(crate) struct MicroBatches<'a> {
    rows: Vec<Vec<&'a Sample>>,
    batches: Vec<Prepared<'static>>,
}

impl<'a> MicroBatches<'a> {
    pub(crate) fn new(rows: Vec<Vec<&'a Sample>>) -> MicroBatches<'a> {
        let batch = |rows: &Vec<&Sample>| Prepared::new(Cow::Owned(train_batch(rows.iter().copied())));
        MicroBatches { batches: rows.iter().map(batch).collect(), rows }
    }
}

/// One step over its micro-batches. The gradient is that of `Σ w·nll / Σ w` over all of them and over all ranks of
/// `collective`: never a mean of means. Every rank takes the step with its own micro-batches and ends with the same
/// weights; the outcome is the whole step's. Micro-batch `n` of rank `r` is number `n · ranks + r` of the step
/// ([`crate::sampler::Sampler::dealt`]), and has the dropout of that number whichever rank computes it. The model shares its optimizer
/// with these ranks ([`Model::share_optimizer`]).
///
/// `updates` is the number of updates made before (AdamW's bias correction counts updates, not steps). Where the
/// weights sum to zero nothing changes and `loss` is `None`. Where a target's loss or the gradient's norm is not
/// finite, nothing changes and the error names the rows.
pub fn step<B: Backend>(
    model: &mut Model<B>,
    micro_batches: &[Vec<&Sample>],
    settings: &Settings,
    learning_rate: f64,
    updates: u64,
    collective: &dyn Collective,
) -> Result<StepOutcome> {
    let micro_batches = MicroBatches::new(micro_batches.to_vec());
    step_of(model, &micro_batches, settings, learning_rate, updates, collective)
}

/// As [`step`], over micro-batches that are prepared.
pub(crate) fn step_of<B: Backend>(
    model: &mut Model<B>,
    micro_batches: &MicroBatches<'_>,
    settings: &Settings,
    learning_rate: f64,
    updates: u64,
    collective: &dyn Collective,
) -> Result<StepOutcome> {
    let MicroBatches { rows: micro_batches, batches } = micro_batches;
    let targets = || batches.iter().flat_map(|batch| &batch.batch().targets);
    let tokens: usize = batches.iter().map(|batch| batch.batch().tokens()).sum();
    let of_rank = targets().map(|target| f64::from(target.weight)).sum();
    let mut sums = [of_rank, targets().count() as f64, tokens as f64, batches.len() as f64];
    collective.sum(&mut sums)?;
    let [weight, .., passes] = sums;
    let mut outcome = StepOutcome {
        loss: None,
        grad_norm: 0.0,
        targets: sums[1] as u64,
        tokens: sums[2] as u64,
        mean_token_accuracy: None,
        entropy: None,
        aux_loss: None,
    };
    if weight <= 0.0 {
        return Ok(outcome);
    }

    let non_finite = |what, value, rows| Error::NonFinite {
        step: None,
        evaluation: false,
        what,
        value,
        rows,
        checkpoint: None,
    };
    model.choose_optimizer(settings.optimizer())?;
    model.zero_gradients();
    let scale = (1.0 / weight) as f32;
    // Every micro-batch of the run has its own dropout and noise.
    let seed = Rng::new(settings.seed, Purpose::Noise, updates).word();
    let mut pass = |(n, batch)| {
        let place = (n * collective.ranks() + collective.rank()) as u64;
        model.regularise(Regularisation {
            seed: Some(seed.wrapping_add(place)),
            dropout: !settings.disable_dropout,
            noise_alpha: settings.neftune_noise_alpha.unwrap_or(0.0) as f32,
            label_smoothing: settings.label_smoothing_factor as f32,
            // The mean over the step's micro-batches, as TRL takes it.
            balance: (1.0 / passes) as f32,
        });
        model.accumulate_prepared(batch, scale)
    };
    let pending: Vec<_> = batches.iter().enumerate().map(&mut pass).collect();
    let (mut sum, mut broken) = (0.0f64, None);
    let (mut right, mut entropy) = (0u64, 0.0f64);
    let factor = f64::from(model.architecture().balance);
    let mut balance = 0.0f64;
    for ((batch, rows), losses) in batches.iter().zip(micro_batches).zip(pending) {
        let losses = losses?;
        balance += model.read_balance(&losses)?.unwrap_or(0.0) / passes;
        let losses = model.read_losses(&losses)?;
        if let (None, Some(bad)) = (&broken, losses.iter().find(|loss| !loss.nll.is_finite())) {
            let targets = rows.iter().flat_map(|row| row.targets().map(move |(at, ..)| (row, at)));
            let of = targets.zip(&losses).filter(|(_, loss)| !loss.nll.is_finite());
            let mut of: Vec<_> = of.map(|((row, at), _)| row_at(row, at)).collect();
            of.dedup();
            broken = Some(non_finite("the loss", f64::from(bad.nll), of));
        }
        for (loss, target) in losses.iter().zip(&batch.batch().targets) {
            sum += f64::from(target.weight) * loss.smoothed(settings.label_smoothing_factor);
            right += u64::from(loss.top1);
            entropy += f64::from(loss.entropy);
        }
    }
    // All ranks learn here whether one of them has a loss that is not finite, and end together.
    let mut sums = [sum, right as f64, entropy, balance];
    collective.sum(&mut sums)?;
    let (mut loss, count) = (sums[0] / weight, outcome.targets as f64);
    if factor != 0.0 {
        outcome.aux_loss = Some(sums[3]);
        loss += factor * sums[3];
    }
    outcome.mean_token_accuracy = Some(sums[1] / count);
    outcome.entropy = Some(sums[2] / count);
    if let Some(broken) = broken {
        return Err(broken);
    }
    if loss.is_finite() {
        outcome.grad_norm = model.reduce_gradients(collective)?;
    }
    for (what, value) in [("the loss", loss), ("the gradient norm", outcome.grad_norm)] {
        if !value.is_finite() {
            let own = || micro_batches.iter().flatten().flat_map(|row| row_ids(row)).collect();
            // The rank whose rows cause it has named them above.
            let elsewhere = what == "the loss" && collective.ranks() > 1;
            return Err(non_finite(what, value, if elsewhere { Vec::new() } else { own() }));
        }
    }
    let update = Update {
        t: updates + 1,
        beta1: settings.adam_beta1,
        beta2: settings.adam_beta2,
        eps: settings.adam_epsilon,
        momentum: settings.momentum(),
        gradient_scale: clip_coefficient(settings.max_grad_norm, outcome.grad_norm) as f32,
    };
    // As PyTorch's schedulers do: all groups follow the same schedule, each from its own highest rate.
    let share = if settings.learning_rate > 0.0 { learning_rate / settings.learning_rate } else { 0.0 };
    model.update(&update, &|parameter| {
        let group = settings.param_groups.iter().find(|group| group.patterns.matches(&parameter.name));
        let decayed = settings.decay_all || parameter.kind.decays();
        let own = |rate: fn(&ParamGroup) -> Option<f64>| group.and_then(rate);
        Rates {
            lr: match own(|group| group.learning_rate) {
                Some(rate) if rate != settings.learning_rate => rate * share,
                _ => learning_rate,
            },
            weight_decay: own(|group| group.weight_decay).unwrap_or(if decayed {
                settings.weight_decay
            } else {
                0.0
            }),
        }
    })?;
    model.exchange_parameters(collective)?;
    if let Some(decay) = settings.ema_decay {
        model.update_average(decay)?;
    }
    outcome.loss = Some(loss);
    Ok(outcome)
}
