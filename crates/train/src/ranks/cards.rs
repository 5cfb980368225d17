//! Checks that each rank has its own card and that all ranks compute in the same way.

use crate::{Error, Result};
use serde::{Deserialize, Serialize};
use suasion_engine::Collective;

/// The number of the card that a rank uses: its number among the ranks of its machine. A rank that sees a single card uses it
/// if its launcher may have assigned that card (`own_card`).
///
/// # Errors
/// [`Error::Setting`] if there are not enough cards, or no variable selects one.
pub fn card_of(
    local_rank: Option<usize>,
    local: Option<usize>,
    own_card: bool,
    cards: usize,
) -> Result<usize> {
    if cards == 1 && own_card {
        return Ok(0);
    }
    let help = "each rank needs a card of its own: start as many ranks on a machine as it has cards (--ranks, \
                --nproc-per-node, --ntasks-per-node), or set device=cpu; CUDA_VISIBLE_DEVICES hides and orders cards";
    let have = if cards == 1 { "is 1 card".to_string() } else { format!("are {cards} cards") };
    if let Some(local) = local.filter(|local| *local > cards) {
        return Err(Error::setting(
            "ranks on this machine",
            local,
            format!("is more than there are cards: there {have}"),
            help,
        ));
    }
    match local_rank {
        Some(number) if number < cards => Ok(number),
        Some(number) => {
            Err(Error::setting("LOCAL_RANK", number, format!("is the number of no card: there {have}"), help))
        }
        None => {
            let help =
                "set it to the number of the rank on its machine, as torchrun and Slurm (SLURM_LOCALID) do";
            Err(Error::setting(
                "LOCAL_RANK",
                "nothing",
                format!("is set, and it chooses the card: there {have}"),
                help,
            ))
        }
    }
}

/// Where a rank computes; sent to the others.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Seat {
    /// The card, with its number and name; `None` for the CPU.
    pub card: Option<String>,
    /// The card's UUID.
    pub uuid: Option<[u8; 16]>,
    /// What factors of products are rounded to.
    pub precision: String,
}

/// Refuses ranks on different kinds of devices, and two ranks on one card.
///
/// # Errors
/// [`Error::RankMismatch`] and [`Error::Rank`], on all ranks; as [`Collective::send`].
pub fn agree(own: &Seat, collective: &dyn Collective) -> Result<()> {
    let message = serde_json::to_vec(own).expect("names and numbers are plain text");
    let read = |message: &Vec<u8>| serde_json::from_slice(message).ok();
    let all: Vec<Option<Seat>> = collective.exchange(&message)?.iter().map(read).collect();
    let Some(seats) = all.into_iter().collect::<Option<Vec<Seat>>>() else {
        return Err(suasion_engine::Error::Collective { message: "the ranks are not in step".into() }.into());
    };
    compare(&seats)
}

fn compare(seats: &[Seat]) -> Result<()> {
    let device = |seat: &Seat| if seat.card.is_some() { "a card" } else { "the CPU" }.to_string();
    for (rank, seat) in seats.iter().enumerate() {
        for (what, theirs, first) in [
            ("device", device(seat), device(&seats[0])),
            ("matmul_precision", seat.precision.clone(), seats[0].precision.clone()),
        ] {
            if theirs != first {
                return Err(Error::RankMismatch { what: what.into(), rank, theirs, first });
            }
        }
        let same = |other: &&Seat| other.uuid.is_some() && other.uuid == seat.uuid;
        if let Some(other) = seats[..rank].iter().position(|other| same(&other)) {
            let card = seat.card.as_deref().unwrap_or("a card");
            return Err(Error::Rank {
                message: format!("rank {other} and rank {rank} have the same card: {card}"),
                help: "each rank needs a card of its own: start as many ranks on a machine as it has cards (--ranks, \
                       --nproc-per-node, --ntasks-per-node), and let CUDA_VISIBLE_DEVICES show all of them, or each rank its \
                       own"
                    .into(),
            });
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_rank_takes_the_card_of_its_number() {
        assert_eq!(card_of(Some(2), Some(4), false, 4).unwrap(), 2);
        assert_eq!(card_of(Some(2), None, true, 8).unwrap(), 2);
        // Slurm shows each task its own.
        assert_eq!(card_of(Some(2), Some(4), true, 1).unwrap(), 0);
        for (given, text) in [
            (
                (Some(0), Some(4), true, 2),
                "ranks on this machine: 4 is more than there are cards: there are 2 cards",
            ),
            (
                (Some(0), Some(2), false, 1),
                "ranks on this machine: 2 is more than there are cards: there is 1 card",
            ),
            ((Some(3), None, true, 2), "LOCAL_RANK: 3 is the number of no card: there are 2 cards"),
            ((None, None, true, 2), "LOCAL_RANK: nothing is set, and it chooses the card: there are 2 cards"),
        ] {
            let (local_rank, local, own, cards) = given;
            let error = card_of(local_rank, local, own, cards).unwrap_err();
            assert_eq!((error.tag(), error.to_string().as_str(), error.is_usage()), ("E-CONFIG", text, true));
        }
    }

    #[test]
    fn ranks_have_a_card_each_and_compute_alike() {
        let card = |n: u8| Seat {
            card: Some(format!("cuda:{n}, a card")),
            uuid: Some([n; 16]),
            precision: "bf16".into(),
        };
        let cpu = Seat { card: None, uuid: None, precision: "f32".into() };
        assert!(
            compare(&[card(0), card(1), card(2)]).is_ok() && compare(&[cpu.clone(), cpu.clone()]).is_ok()
        );
        let refused = |seats: &[Seat], text: &str| assert_eq!(compare(seats).unwrap_err().to_string(), text);
        refused(&[card(0), card(1), card(0)], "rank 0 and rank 2 have the same card: cuda:0, a card");
        refused(&[card(0), cpu], "rank 1 and rank 0 differ in device: the CPU and a card");
        let other = Seat { precision: "tf32".into(), ..card(1) };
        refused(&[card(0), other], "rank 1 and rank 0 differ in matmul_precision: tf32 and bf16");
    }
}
