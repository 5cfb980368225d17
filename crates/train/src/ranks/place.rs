//! The rank of a process and the number of ranks, from the variables that its launcher sets.

use crate::{Error, Result};

/// The default port of the first rank, as in torch.
const PORT: u16 = 29500;

/// The place of a process among the ranks of a run.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Place {
    /// Its number, from 0.
    pub rank: usize,
    /// How many there are.
    pub ranks: usize,
    /// How many of them are on this machine, where that is known.
    pub local: Option<usize>,
    /// Its number among those on this machine, where that is known.
    pub local_rank: Option<usize>,
    /// Processors assigned to it, where that is known.
    pub processors: Option<usize>,
    /// The host of the first rank.
    pub host: String,
    /// The port on which it listens.
    pub port: u16,
    /// The token that all ranks of this run share, and those of other runs do not.
    pub token: String,
}

/// The variable that overrides the port; torchrun's own store may have `MASTER_PORT`.
pub const OWN_PORT: &str = "SUASION_MASTER_PORT";
/// The variable of the token.
pub const TOKEN: &str = "SUASION_RUN_TOKEN";

/// The number of a process among those of a run.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Numbered {
    /// Its number, from 0.
    pub rank: usize,
    /// How many there are, at least two.
    pub ranks: usize,
    /// They are tasks of Slurm, which may have different work.
    pub slurm: bool,
}

impl Numbered {
    /// Reads `RANK` and `WORLD_SIZE`, or a Slurm task's numbers. `None` if there is one process.
    ///
    /// # Errors
    /// [`Error::Setting`] for variables that are missing or contradict each other.
    pub fn of(variable: &dyn Fn(&str) -> Option<String>) -> Result<Option<Numbered>> {
        let number = |name: &'static str| whole(variable, name);
        let slurm_ranks = match number("SLURM_STEP_NUM_TASKS")? {
            Some(ranks) => Some(ranks),
            None => number("SLURM_NTASKS")?,
        };
        let (rank, ranks, slurm) = match (number("RANK")?, number("WORLD_SIZE")?) {
            (Some(rank), Some(ranks)) => (rank, ranks, false),
            (Some(rank), None) => return Err(missing("WORLD_SIZE", "RANK", rank)),
            // Some containers and schedulers set it everywhere.
            (None, Some(ranks)) if ranks > 1 => return Err(missing("RANK", "WORLD_SIZE", ranks)),
            (None, _) => match (number("SLURM_PROCID")?, slurm_ranks) {
                (Some(rank), Some(ranks)) => (rank, ranks, true),
                _ => return Ok(None),
            },
        };
        if rank >= ranks {
            let (own, all) = Numbered::names(slurm);
            let problem = format!("is not below {all}={ranks}");
            return Err(Error::setting(own, rank, problem, "ranks are numbered from 0"));
        }
        Ok((ranks > 1).then_some(Numbered { rank, ranks, slurm }))
    }

    /// The variables of the two numbers.
    fn names(slurm: bool) -> (&'static str, &'static str) {
        if slurm { ("SLURM_PROCID", "SLURM_NTASKS") } else { ("RANK", "WORLD_SIZE") }
    }
}

/// A variable that is set and not empty.
fn plain(variable: &dyn Fn(&str) -> Option<String>, name: &str) -> Option<String> {
    variable(name).map(|value| value.trim().to_string()).filter(|value| !value.is_empty())
}

/// A variable with a whole number.
fn whole(variable: &dyn Fn(&str) -> Option<String>, name: &'static str) -> Result<Option<usize>> {
    let Some(text) = plain(variable, name) else { return Ok(None) };
    let help = "torchrun and Slurm set it; for one process, unset it";
    text.parse().map(Some).map_err(|_| Error::setting(name, &text, "is not a whole number", help))
}

impl Place {
    /// Reads the variables of torchrun (`RANK`, `WORLD_SIZE`, `LOCAL_RANK`, `LOCAL_WORLD_SIZE`, `MASTER_ADDR`, `MASTER_PORT`), or
    /// those of a Slurm task. `None` if the process is a run of its own.
    ///
    /// # Errors
    /// [`Error::Setting`] for variables that are missing or contradict each other.
    pub fn of(variable: &dyn Fn(&str) -> Option<String>) -> Result<Option<Place>> {
        let get = |name: &str| plain(variable, name);
        let number = |name: &'static str| whole(variable, name);
        let Some(Numbered { rank, ranks, slurm }) = Numbered::of(variable)? else { return Ok(None) };
        let names = Numbered::names(slurm);
        let host = match get("MASTER_ADDR") {
            Some(host) => host,
            None if slurm => match ["SLURM_STEP_NODELIST", "SLURM_NODELIST", "SLURM_JOB_NODELIST"]
                .iter()
                .find_map(|name| get(name))
            {
                Some(nodes) => first_node(&nodes),
                None => return Err(missing("MASTER_ADDR", names.0, rank)),
            },
            None => return Err(missing("MASTER_ADDR", names.0, rank)),
        };
        let port = |name: &'static str| -> Result<Option<u16>> {
            let help = "a port is a number from 1 to 65535";
            match number(name)?.map(u16::try_from) {
                None => Ok(None),
                Some(Ok(port)) if port > 0 => Ok(Some(port)),
                _ => Err(Error::setting(name, get(name).unwrap_or_default(), "is not a port", help)),
            }
        };
        let job = get("SLURM_JOB_ID").filter(|_| slurm);
        let port = match (port(OWN_PORT)?, port("MASTER_PORT")?) {
            (Some(port), _) => port,
            // torchrun's agent listens there itself.
            (None, Some(port)) if get("TORCHELASTIC_USE_AGENT_STORE").is_some_and(|is| is == "True") => {
                port.checked_add(1).unwrap_or(port - 1)
            }
            (None, Some(port)) => port,
            // Two jobs on one machine need different ports.
            (None, None) => job.as_deref().and_then(port_of_job).unwrap_or(PORT),
        };
        let processors = if slurm { number("SLURM_CPUS_PER_TASK")? } else { None };
        let local = match number("LOCAL_WORLD_SIZE")? {
            Some(local) => Some(local),
            None if slurm => tasks_here(&get),
            None => None,
        };
        let local_rank = match number("LOCAL_RANK")? {
            None if slurm => number("SLURM_LOCALID")?,
            number => number,
        };
        let token = [get(TOKEN), get("TORCHELASTIC_RUN_ID"), job].into_iter().flatten().next();
        let token = token.unwrap_or_default();
        Ok(Some(Place { rank, ranks, local, local_rank, processors, host, port, token }))
    }
}

fn missing(name: &'static str, beside: &str, value: impl std::fmt::Display) -> Error {
    let problem = format!("is set, but {beside}={value} is");
    let help = "a process of a run over ranks needs RANK, WORLD_SIZE, MASTER_ADDR and MASTER_PORT, as torchrun sets them; for \
                one process, unset them; `suasion train --ranks N` starts N processes on this machine";
    Error::setting(name, "nothing", problem, help)
}

/// The first host of Slurm's list of nodes: `gpu[03-07,9],login` is `gpu03`.
fn first_node(nodes: &str) -> String {
    let Some((prefix, rest)) = nodes.split_once('[').filter(|(prefix, _)| !prefix.contains(',')) else {
        return nodes.split(',').next().unwrap_or(nodes).to_string();
    };
    let (inside, suffix) = rest.split_once(']').unwrap_or((rest, ""));
    let number = inside.split([',', '-']).next().unwrap_or(inside);
    format!("{prefix}{number}{}", suffix.split(',').next().unwrap_or(suffix))
}

/// A port by the number of a Slurm job.
fn port_of_job(job: &str) -> Option<u16> {
    let last = job.len().saturating_sub(4);
    Some(15000 + job.get(last..)?.parse::<u16>().ok()?)
}

/// Tasks of a Slurm step on this machine.
fn tasks_here(get: &dyn Fn(&str) -> Option<String>) -> Option<usize> {
    // `4(x2),3`: on each of two machines four, on the third three; a step begins with the largest.
    let text = get("SLURM_STEP_TASKS_PER_NODE").or_else(|| get("SLURM_TASKS_PER_NODE"))?;
    text.split([',', '(']).next()?.parse().ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn place(variables: &[(&str, &str)]) -> Result<Option<Place>> {
        Place::of(&|name| variables.iter().find(|(n, _)| *n == name).map(|(_, value)| value.to_string()))
    }

    #[test]
    fn the_variables_of_torchrun_and_slurm_are_read() {
        let torch = [
            ("RANK", "1"),
            ("WORLD_SIZE", "4"),
            ("LOCAL_RANK", "1"),
            ("LOCAL_WORLD_SIZE", "2"),
            ("SLURM_LOCALID", "0"),
            ("MASTER_ADDR", "node7"),
            ("MASTER_PORT", "29400"),
            ("TORCHELASTIC_RUN_ID", "abc"),
            ("SLURM_PROCID", "0"),
            ("SLURM_NTASKS", "1"),
        ];
        let want = Place {
            rank: 1,
            ranks: 4,
            local: Some(2),
            local_rank: Some(1),
            processors: None,
            host: "node7".into(),
            port: 29400,
            token: "abc".into(),
        };
        assert_eq!(place(&torch).unwrap(), Some(want.clone()));
        // torchrun's agent listens on MASTER_PORT itself.
        let shared = [&torch[..], &[("TORCHELASTIC_USE_AGENT_STORE", "True")]].concat();
        assert_eq!(place(&shared).unwrap().unwrap().port, 29401);
        let own = [&shared[..], &[(OWN_PORT, "5000"), (TOKEN, "t")]].concat();
        let own = place(&own).unwrap().unwrap();
        assert_eq!((own.port, own.token.as_str()), (5000, "t"));

        let slurm = [
            ("SLURM_PROCID", "3"),
            ("SLURM_LOCALID", "1"),
            ("SLURM_NTASKS", "6"),
            ("SLURM_NODELIST", "gpu[03-04,9],login"),
            ("SLURM_JOB_ID", "1234567"),
            ("SLURM_TASKS_PER_NODE", "2(x3)"),
        ];
        let got = place(&slurm).unwrap().unwrap();
        assert_eq!((got.rank, got.ranks, got.local, got.local_rank), (3, 6, Some(2), Some(1)));
        assert_eq!((got.host.as_str(), got.port, got.token.as_str()), ("gpu03", 19567, "1234567"));

        for one in [&[][..], &[("WORLD_SIZE", "1")], &[("RANK", "0"), ("WORLD_SIZE", "1")]] {
            assert_eq!(place(one).unwrap(), None);
        }
        assert_eq!(place(&[("SLURM_PROCID", "0"), ("SLURM_NTASKS", "1")]).unwrap(), None);
    }

    #[test]
    fn nodes_of_slurm() {
        for (list, first) in
            [("a", "a"), ("a,b", "a"), ("n[1,3]", "n1"), ("x,n[1-3]", "x"), ("n[07-9]-ib", "n07-ib")]
        {
            assert_eq!(first_node(list), first);
        }
    }

    #[test]
    fn what_is_missing_is_named() {
        let refused = |variables: &[(&str, &str)], text: &str| {
            let error = place(variables).unwrap_err();
            assert!(error.is_usage() && error.to_string().contains(text), "{error}");
        };
        refused(&[("RANK", "0")], "WORLD_SIZE: nothing is set, but RANK=0 is");
        refused(&[("WORLD_SIZE", "2")], "RANK: nothing is set, but WORLD_SIZE=2 is");
        refused(&[("RANK", "0"), ("WORLD_SIZE", "2")], "MASTER_ADDR: nothing is set, but RANK=0 is");
        refused(&[("RANK", "2"), ("WORLD_SIZE", "2")], "RANK: 2 is not below WORLD_SIZE=2");
        refused(&[("RANK", "x"), ("WORLD_SIZE", "2")], "RANK: x is not a whole number");
        let port = [("RANK", "0"), ("WORLD_SIZE", "2"), ("MASTER_ADDR", "h"), ("MASTER_PORT", "70000")];
        refused(&port, "MASTER_PORT: 70000 is not a port");
    }
}
