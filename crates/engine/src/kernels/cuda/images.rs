//! The compiled kernels, `kernels.bin`: one image for each of several architectures, and PTX for later architectures.

use crate::{Error, Result};
use std::io::Read;

/// The oldest CUDA version whose drivers load the images: they are compiled by CUDA 12.
pub(super) const DRIVER: (u32, u32) = (12, 0);

/// The file written, and documented, by `.ci/cuda`.
static PACKED: &[u8] = include_bytes!("kernels.bin");

/// The magic bytes, then sizes: the hash of the sources and the entry of an image.
const MAGIC: &[u8] = b"SUASIONK";
const HASH: usize = 32;
const ENTRY: usize = 28;

/// An image in the file.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Image {
    name: &'static str,
    compressed: &'static [u8],
    len: usize,
}

/// All images.
fn all() -> impl Iterator<Item = Image> {
    let number = |at: usize| {
        PACKED.get(at..at + 4).map_or(0, |b| u32::from_le_bytes([b[0], b[1], b[2], b[3]]) as usize)
    };
    let first = MAGIC.len() + HASH;
    let count = if PACKED.starts_with(MAGIC) { number(first) } else { 0 };
    (0..count).filter_map(move |n| {
        let at = first + 4 + n * ENTRY;
        let name = std::str::from_utf8(PACKED.get(at..at + 16)?).ok()?.trim_end_matches('\0');
        let (start, compressed, len) = (number(at + 16), number(at + 20), number(at + 24));
        Some(Image { name, compressed: PACKED.get(start..start + compressed)?, len })
    })
}

/// The image for a card: code runs on cards of the same major version and the same or a later minor one; the driver
/// compiles PTX for later cards.
pub(super) fn of((major, minor): (u32, u32)) -> Option<Image> {
    let version = |image: &Image| {
        let number: u32 = image.name.strip_prefix("sm_")?.parse().ok()?;
        Some((number / 10, number % 10))
    };
    let fits = |image: &Image| version(image).is_some_and(|(of, least)| of == major && least <= minor);
    let code = all().filter(fits).max_by_key(version);
    let oldest = all().filter_map(|image| version(&image)).min()?;
    code.or_else(|| all().find(|image| image.name == "ptx" && (major, minor) >= oldest))
}

impl Image {
    /// The decompressed image, for the driver.
    ///
    /// # Errors
    /// [`Error::Device`] if the binary is damaged.
    pub(super) fn unpack(self) -> Result<Vec<u8>> {
        let mut bytes = Vec::with_capacity(self.len + 1);
        let read =
            flate2::read::ZlibDecoder::new(self.compressed).take(self.len as u64).read_to_end(&mut bytes);
        if read.ok() != Some(self.len) {
            let message = format!("the kernels for {} in this binary are damaged", self.name);
            return Err(Error::Device { message, help: "install suasion again".into() });
        }
        // PTX is a NUL-terminated text.
        bytes.push(0);
        Ok(bytes)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_card_from_ampere_on_has_an_image() {
        for (compute, name) in [
            ((8, 0), Some("sm_80")),
            ((8, 6), Some("sm_86")),
            ((8, 7), Some("sm_86")),
            ((8, 9), Some("sm_89")),
            ((9, 0), Some("sm_90")),
            ((10, 0), Some("sm_100")),
            ((10, 3), Some("sm_100")),
            ((11, 0), Some("ptx")),
            ((12, 1), Some("sm_120")),
            ((13, 0), Some("ptx")),
            ((7, 5), None),
        ] {
            assert_eq!(of(compute).map(|image| image.name), name, "{compute:?}");
        }
    }

    #[test]
    fn images_are_whole_and_have_the_kernels() {
        for image in all() {
            let bytes = image.unpack().unwrap();
            let has = |name: &[u8]| bytes.windows(name.len()).any(|window| window == name);
            assert!(has(b"cross_entropy") && has(b"attention_dkv_f32_128"), "{}", image.name);
            assert_eq!(bytes.starts_with(b"\x7fELF"), image.name != "ptx", "{}", image.name);
        }
        assert!(all().count() >= 7);
    }
}
