//! Single kernels on the emulated card. Operations of a backend are compared in `kernels.rs`; these tests cover what
//! those do not reach, and the emulation itself.

mod common;

use common::emulation::{Argument, Emulation, RACES, build, declared, library, sanitizer};
use common::{Random, relative};
use sha2::{Digest, Sha256};
use std::path::{Path, PathBuf};

/// Thread schedules: in order, then one of each kind.
const SEEDS: [u32; 3] = [0, 1, 2];

/// Runs a kernel under a schedule.
macro_rules! launch {
    ($emulation:expr, $seed:expr, $name:expr, $size:expr, [$($argument:expr),* $(,)?]) => {{
        let mut arguments: Vec<Argument> = vec![$(Argument::from($argument)),*];
        let (grid, block): ([u32; 3], [u32; 3]) = $size;
        $emulation.launch($name, grid, block, 0, &mut arguments, $seed)
    }};
}

fn values(n: usize, seed: u64) -> Vec<f32> {
    let mut random = Random(seed);
    (0..n).map(|_| random.normal() as f32).collect()
}

/// The address of an absent operand.
const NONE: u64 = 0;

/// Sizes `E`, `R` and `W` of kernels.h, with so few blocks that each block loops several times.
fn of_elements(n: usize) -> ([u32; 3], [u32; 3]) {
    ([n.div_ceil(1024).min(2) as u32, 1, 1], [256, 1, 1])
}

fn of_matrix(rows: usize, width: usize) -> ([u32; 3], [u32; 3]) {
    ([width.div_ceil(128).min(2) as u32, rows.div_ceil(8).min(2) as u32, 1], [32, 8, 1])
}

#[test]
fn every_declared_kernel_can_be_launched_by_name() {
    let Some(library) = library() else { return };
    let emulation = Emulation::load(&library);
    let names = declared();
    assert!(names.len() > 90, "{}", names.len());
    for (name, _) in &names {
        // A block of one thread is rejected before the kernel runs.
        let error = emulation.launch(name, [1, 1, 1], [1, 1, 1], 0, &mut [], 0).unwrap_err();
        assert!(error.contains("blocks of 1 threads"), "{name}: {error}");
    }
    let error = emulation.launch("none", [1, 1, 1], [32, 1, 1], 0, &mut [], 0).unwrap_err();
    assert_eq!(error, "no kernel none");
}

/// `kernels.bin` holds the hash of the sources that it was made from. Whether it holds their compiled form is checked
/// by `.ci/cuda check`, where NVRTC is available.
#[test]
fn the_compiled_kernels_are_of_this_source() {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("src/kernels/cuda");
    let packed = std::fs::read(folder.join("kernels.bin")).unwrap();
    let names =
        std::fs::read_dir(&folder).unwrap().map(|entry| entry.unwrap().file_name().into_string().unwrap());
    let mut names: Vec<String> =
        names.filter(|name| [".cu", ".cuh", ".h"].iter().any(|end| name.ends_with(end))).collect();
    names.sort();
    let mut hash = Sha256::new();
    for name in &names {
        let text = std::fs::read(folder.join(name)).unwrap();
        hash.update(format!("{name} {}\n", text.len()));
        hash.update(text);
    }
    assert_eq!(&packed[..8], b"SUASIONK");
    assert_eq!(packed[8..40], hash.finalize()[..], "the kernels have changed: run .ci/cuda build");
}

/// Sizes below, at and above those that a thread, a warp and a block process at once.
const SIZES: [(usize, usize); 7] = [(1, 1), (1, 3), (3, 33), (9, 128), (17, 129), (70, 31), (2, 1030)];

/// Conversions of bf16 and f16, for every kind of number, to and from f32, between rows with gaps: the same as the
/// crate `half`.
#[test]
fn conversions_round_to_the_nearest_even() {
    let Some(library) = library() else { return };
    let emulation = Emulation::load(&library);
    let special = [
        0.0,
        -0.0,
        1.0,
        65504.0,
        65519.9,
        65520.0,
        -1e9,
        6e-8,
        2.98e-8,
        2.9802326e-8,
        6.1e-5,
        1e-40,
        f32::MAX,
        f32::INFINITY,
        f32::NEG_INFINITY,
        1.0 + 1.0 / 256.0,
        1.0 + 3.0 / 256.0,
        f32::NAN,
    ];
    for seed in SEEDS {
        for (rows, width) in SIZES {
            let mut x = values(rows * width, 1);
            x.iter_mut().enumerate().for_each(|(i, x)| *x *= 10f32.powi(i as i32 % 13 - 8));
            for (x, special) in x.iter_mut().zip(special) {
                *x = special;
            }
            let (stride, to) = (width + 3, (rows as u32, width as u32));
            let rounded = |kernel: &str| {
                let mut y = vec![0x7777u16; rows * stride];
                let size = of_matrix(rows, stride);
                let of = stride as u32;
                launch!(emulation, seed, kernel, size, [&mut y, of, &x, to.1, to.0, to.1]).unwrap();
                assert!(y.chunks(stride).all(|row| row[width..].iter().all(|x| *x == 0)), "{kernel}");
                y
            };
            let dense =
                |y: &[u16]| -> Vec<u16> { y.chunks(stride).flat_map(|row| row[..width].to_vec()).collect() };
            let back = |kernel: &str, y: &[u16]| {
                let mut z = vec![f32::NAN; rows * width];
                let size = of_matrix(rows, width);
                let of = stride as u32;
                launch!(emulation, seed, kernel, size, [&mut z, to.1, y, of, to.0, to.1]).unwrap();
                z
            };
            let same = |a: &[f32], b: &[f32], what: &str| {
                let equal = |(a, b): (&f32, &f32)| a.to_bits() == b.to_bits() || a.is_nan() && b.is_nan();
                assert!(a.iter().zip(b).all(equal), "{what} [{rows}, {width}]");
            };
            let bf16s = rounded("f32_to_bf16");
            let expected: Vec<f32> = x.iter().map(|x| half::bf16::from_f32(*x).to_f32()).collect();
            same(&back("bf16_to_f32", &bf16s), &expected, "bf16");
            let mut f16s = vec![0u16; rows * stride];
            for (to, x) in f16s.chunks_mut(stride).zip(x.chunks(width)) {
                to.iter_mut().zip(x).for_each(|(to, x)| *to = half::f16::from_f32(*x).to_bits());
            }
            let expected: Vec<f32> = x.iter().map(|x| half::f16::from_f32(*x).to_f32()).collect();
            same(&back("f16_to_f32", &f16s), &expected, "f16");
            let mut both = vec![0u16; rows * width];
            let size = of_matrix(rows, width);
            let (width_of, of) = (to.1, stride as u32);
            launch!(emulation, seed, "f16_to_bf16", size, [&mut both, width_of, &f16s, of, to.0, width_of])
                .unwrap();
            let both: Vec<f32> = both.iter().map(|x| half::bf16::from_bits(*x).to_f32()).collect();
            let twice = |x: &u16| half::bf16::from_f32(half::f16::from_bits(*x).to_f32()).to_f32();
            let expected: Vec<f32> = dense(&f16s).iter().map(twice).collect();
            same(&both, &expected, "f16 to bf16");
        }
    }
}

/// QLoRA's NF4 values from bitsandbytes' table, in order.
const NF4: [f32; 16] = [
    -1.0,
    -0.696_192_8,
    -0.525_073_05,
    -0.394_917_5,
    -0.284_441_38,
    -0.184_773_43,
    -0.091_050_036,
    0.0,
    0.079_580_3,
    0.160_930_2,
    0.246_112_3,
    0.337_915_24,
    0.440_709_83,
    0.562_617,
    0.722_956_84,
    1.0,
];

#[test]
fn blocks_of_quantised_weights() {
    let Some(library) = library() else { return };
    let emulation = Emulation::load(&library);
    for seed in SEEDS {
        for n in [1usize, 2, 63, 64, 65, 129, 1027] {
            let codes: Vec<u8> = (0..n.div_ceil(2)).map(|i| (i * 37 % 256) as u8).collect();
            let code = |i: usize| {
                usize::from(if i.is_multiple_of(2) { codes[i / 2] >> 4 } else { codes[i / 2] & 15 })
            };
            // Also with a block size other than NF4's.
            for block_size in [64u32, 32] {
                let scales = values(n.div_ceil(block_size as usize), 5);
                let expected: Vec<f32> =
                    (0..n).map(|i| NF4[code(i)] * scales[i / block_size as usize]).collect();
                let mut y = vec![f32::NAN; n];
                let size = of_elements(n);
                launch!(emulation, seed, "nf4_to_f32", size, [&mut y, &codes, &scales, n as u64, block_size])
                    .unwrap();
                assert!(relative(&y, &expected) < 1e-7, "{n} in blocks of {block_size}");
                let mut y = vec![0u16; n];
                launch!(
                    emulation,
                    seed,
                    "nf4_to_bf16",
                    size,
                    [&mut y, &codes, &scales, n as u64, block_size]
                )
                .unwrap();
                let rounded: Vec<u16> = expected.iter().map(|x| half::bf16::from_f32(*x).to_bits()).collect();
                assert_eq!(y, rounded);
            }
            // Codes into a table of 256 values.
            let (table, scales) = (values(256, 7), values(n.div_ceil(256), 8));
            let codes: Vec<u8> = (0..n).map(|i| (i * 37 % 256) as u8).collect();
            let expected: Vec<f32> = (0..n).map(|i| table[usize::from(codes[i])] * scales[i / 256]).collect();
            let mut y = vec![f32::NAN; n];
            let size = of_elements(n);
            launch!(
                emulation,
                seed,
                "int8_to_f32",
                size,
                [&mut y, &codes, &table, &scales, n as u64, 256u32]
            )
            .unwrap();
            assert_eq!(y, expected);
        }
        for (rows, width) in SIZES {
            let scales = values(rows, 9);
            let q: Vec<i8> = (0..rows * width).map(|i| (i * 53 % 255) as i32 as u8 as i8).collect();
            let expected: Vec<f32> =
                (0..q.len()).map(|i| f32::from(q[i]) * (scales[i / width] / 127.0)).collect();
            let mut y = vec![f32::NAN; q.len()];
            let size = of_matrix(rows, width);
            let (r, w) = (rows as u32, width as u32);
            launch!(emulation, seed, "int8_rows_to_f32", size, [&mut y, &q, &scales, r, w]).unwrap();
            assert_eq!(y, expected);
            let mut y = vec![0u16; q.len()];
            launch!(emulation, seed, "int8_rows_to_bf16", size, [&mut y, &q, &scales, r, w]).unwrap();
            let rounded: Vec<u16> = expected.iter().map(|x| half::bf16::from_f32(*x).to_bits()).collect();
            assert_eq!(y, rounded);
        }
    }
}

/// `y[i, :] += b`, leaving the elements around it unchanged.
#[test]
fn a_row_is_added_to_rows_with_gaps() {
    let Some(library) = library() else { return };
    let emulation = Emulation::load(&library);
    for seed in SEEDS {
        for (rows, width) in SIZES {
            let (stride, b) = (width + 2, values(width, 1));
            let before = values(rows * stride, 2);
            let mut y = before.clone();
            let size = of_matrix(rows, width);
            let (of, r, w) = (stride as u32, rows as u32, width as u32);
            launch!(emulation, seed, "add_row", size, [&mut y, of, &b, r, w]).unwrap();
            for (i, (y, before)) in y.iter().zip(&before).enumerate() {
                assert_eq!(*y, b.get(i % stride).map_or(*before, |b| before + b));
            }
        }
    }
}

/// Optimizers also write a bf16 copy of the parameters if they are given an address for it.
#[test]
fn optimizers_round_parameters_to_bf16() {
    let Some(library) = library() else { return };
    let emulation = Emulation::load(&library);
    let n = 1027usize;
    let (g, start) = (values(n, 1), values(n, 2));
    let size = of_elements(n);
    let check = |p: &[f32], copy: &[u16]| {
        assert_ne!(p, start);
        let rounded: Vec<u16> = p.iter().map(|x| half::bf16::from_f32(*x).to_bits()).collect();
        assert_eq!(copy, rounded);
    };
    for seed in SEEDS {
        let (mut p, mut copy) = (start.clone(), vec![0u16; n]);
        let (mut m, mut v) = (vec![0f32; n], vec![0f32; n]);
        launch!(
            emulation,
            seed,
            "adamw",
            size,
            [
                &mut p, &mut copy, &g, &mut m, &mut v, n as u64, 0.999f32, 0.1f32, 0.99f32, 0.01f32, 0.1f32,
                1e-8f32, 1e-2f32, 1.0f32
            ]
        )
        .unwrap();
        check(&p, &copy);
        let sgd = |m: Argument| {
            let (mut p, mut copy) = (start.clone(), vec![0u16; n]);
            let (rate, momentum, decay, scale) = (0.1f32, 0.9f32, 0.01f32, 1.0f32);
            launch!(
                emulation,
                seed,
                "sgd",
                size,
                [&mut p, &mut copy, &g, m, n as u64, rate, momentum, decay, scale]
            )
            .unwrap();
            check(&p, &copy);
            p
        };
        sgd(Argument::from(&mut m));
        let p = sgd(Argument::from(NONE));
        let expected: Vec<f32> = start.iter().zip(&g).map(|(p, g)| p - 0.1 * (g + 0.01 * p)).collect();
        assert!(relative(&p, &expected) < 1e-6);
    }
}

/// A library of norm kernels whose sums lack a barrier, and of kernels with other faults.
fn faults() -> Option<PathBuf> {
    build(|unit| unit == "norms", &["-DPLANT_MISSING_BARRIER", "-DPLANT_FAULTS"])
}

/// The sum of squares over a row of threads, in a kernel without one of its barriers: some schedule must read a sum
/// before it is written.
#[test]
fn a_missing_barrier_is_caught() {
    let (Some(whole), Some(planted)) = (library(), faults()) else { return };
    let (rows, width) = (3usize, 577usize);
    let (x, w) = (values(rows * width, 1), values(width, 2));
    let expected: Vec<f32> = x
        .chunks(width)
        .flat_map(|row| {
            let mean = row.iter().map(|x| f64::from(*x).powi(2)).sum::<f64>() / width as f64;
            let scale = 1.0 / (mean + 1e-6).sqrt();
            row.iter()
                .zip(&w)
                .map(move |(x, w)| (f64::from(*x) * scale * f64::from(*w)) as f32)
                .collect::<Vec<_>>()
        })
        .collect();
    let run = |emulation: &Emulation, seed: u32| {
        let (mut y, mut stats) = (vec![0f32; rows * width], vec![0f32; rows]);
        let of = width as u32;
        launch!(
            emulation,
            seed,
            "rms_norm",
            ([rows as u32, 1, 1], [256, 1, 1]),
            [&mut y, of, &mut stats, &x, of, &w, NONE, rows as u32, 1u32, of, 1e-6f32, 0f32]
        )
        .unwrap();
        relative(&y, &expected)
    };
    let (whole, planted) = (Emulation::load(&whole), Emulation::load(&planted));
    for seed in 0..6 {
        assert!(run(&whole, seed) < 1e-6, "seed {seed}");
        let error = run(&planted, seed);
        assert!(error.is_nan() || error > 1e-3, "seed {seed}: the fault was not seen, error {error:e}");
    }
}

/// Errors of the emulation: kernels that would hang or be undefined on a card.
#[test]
fn faults_of_kernels_are_errors() {
    let Some(library) = faults() else { return };
    let emulation = Emulation::load(&library);
    for seed in SEEDS {
        for (name, part) in [
            ("fault_half_at_barrier", "32 of 64 threads wait for threads that ended"),
            ("fault_lanes_apart", "lanes of a warp meet in different operations"),
            ("fault_ended_lanes", "threads wait for threads that ended"),
            ("fault_undeclared_barrier", "a KERNEL that waits for other threads"),
        ] {
            let error = launch!(emulation, seed, name, ([1, 1, 1], [64, 1, 1]), [NONE]).unwrap_err();
            assert!(error.starts_with(name) && error.contains(part), "{error}");
        }
        // Shared memory that has not been written is NaN, in every block.
        let mut y = vec![0f32; 2];
        launch!(emulation, seed, "fault_unwritten", ([2, 1, 1], [32, 1, 1]), [&mut y]).unwrap();
        assert!(y.iter().all(|y| y.is_nan()), "{y:?}");
    }
}

/// Races are found in every schedule, even harmless ones: a removed barrier, a shuffle in place of a barrier, two
/// blocks that write the same element. All other tests look for races in all kernels.
#[test]
fn races_are_found_in_any_schedule() {
    if sanitizer().is_some() {
        return;
    }
    let flags = ["-DPLANT_MISSING_BARRIER", "-DPLANT_FAULTS", RACES];
    let (Some(planted), Some(whole)) = (build(|unit| unit == "norms", &flags), library()) else { return };
    let (planted, whole) = (Emulation::load(&planted), Emulation::load(&whole));
    let (rows, width) = (3u32, 577u32);
    let (x, w) = (values((rows * width) as usize, 1), values(width as usize, 2));
    for seed in SEEDS {
        let run = |emulation: &Emulation| {
            let (mut y, mut stats) = (vec![0f32; x.len()], vec![0f32; rows as usize]);
            launch!(
                emulation,
                seed,
                "rms_norm",
                ([rows, 1, 1], [256, 1, 1]),
                [&mut y, width, &mut stats, &x, width, &w, NONE, rows, 1u32, width, 1e-6f32, 0f32]
            )
        };
        run(&whole).unwrap();
        let mut y = vec![0f32; 32];
        for (error, what) in [
            (run(&planted).unwrap_err(), "read and write"),
            (
                launch!(planted, seed, "fault_shuffle_is_no_barrier", ([1, 1, 1], [32, 1, 1]), [&mut y])
                    .unwrap_err(),
                "read and write",
            ),
            (
                launch!(planted, seed, "fault_two_blocks", ([2, 1, 1], [32, 1, 1]), [&mut y]).unwrap_err(),
                "write the same memory",
            ),
        ] {
            assert!(error.contains("a race: threads ") && error.contains(what), "seed {seed}: {error}");
        }
    }
}
