//! Ranks for tests, those of suasion-train too.

use std::sync::{Barrier, Mutex};
use suasion_engine::{Collective, Result};

/// Ranks that are threads of one process.
pub struct Threads<'a> {
    pub rank: usize,
    pub barrier: &'a Barrier,
    /// What each rank gave to the exchange at hand.
    pub values: &'a Mutex<Vec<Vec<f64>>>,
}

impl Threads<'_> {
    /// The sums over all ranks, in their order.
    fn exchange(&self, own: Vec<f64>) -> Vec<f64> {
        self.values.lock().unwrap()[self.rank] = own;
        self.barrier.wait();
        let all = self.values.lock().unwrap().clone();
        self.barrier.wait();
        (0..all[0].len()).map(|i| all.iter().map(|values| values[i]).sum()).collect()
    }
}

impl Collective for Threads<'_> {
    fn ranks(&self) -> usize {
        self.values.lock().unwrap().len()
    }

    fn rank(&self) -> usize {
        self.rank
    }

    fn sum(&self, value: f64) -> Result<f64> {
        Ok(self.exchange(vec![value])[0])
    }

    fn all_reduce(&self, values: &mut [f32]) -> Result<()> {
        let sums = self.exchange(values.iter().map(|x| f64::from(*x)).collect());
        values.iter_mut().zip(sums).for_each(|(x, sum)| *x = sum as f32);
        Ok(())
    }
}
