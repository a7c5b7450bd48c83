//! What an image's bytes say about themselves: its format, whether it is whole, whether its dimensions are sane.
//!
//! Structure only: no pixel is decoded and nothing is decompressed, so no image can cost more than a walk over its bytes.
//! A prefix of a valid image is always [`Flaw::Truncated`], never [`Flaw::Unsupported`]: its writer may not be done yet.

/// More pixels than this are no face image, but would cost the engine gigabytes.
const PIXELS_MAX: u64 = 100_000_000;

const PNG_SIGNATURE: &[u8] = b"\x89PNG\r\n\x1a\n";
/// A PNG chunk's length, type and checksum.
const PNG_CHUNK_OVERHEAD: usize = 12;
/// `RIFF`, the length after it, `WEBP`.
const RIFF_HEADER_BYTES: usize = 12;
const BMP_FILE_HEADER_BYTES: usize = 14;

/// The formats that the engine takes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Format {
    /// JPEG, baseline or progressive.
    Jpeg,
    /// PNG.
    Png,
    /// WebP, lossy, lossless or extended.
    WebP,
    /// Windows bitmap.
    Bmp,
}

/// What is wrong with an image, as a fragment for people.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Flaw {
    /// It could still become valid if more bytes came.
    Truncated(&'static str),
    /// More bytes cannot mend it.
    Unsupported(&'static str),
}
use Flaw::{Truncated, Unsupported};

/// Finds the format of a whole image, or what is wrong with it.
pub fn inspect(image: &[u8]) -> Result<Format, Flaw> {
    if image.is_empty() {
        return Err(Truncated("empty"));
    }
    if begins(image, b"\xff\xd8") {
        jpeg(image).map(|()| Format::Jpeg)
    } else if begins(image, PNG_SIGNATURE) {
        png(image).map(|()| Format::Png)
    } else if begins(image, b"RIFF") {
        webp(image).map(|()| Format::WebP)
    } else if begins(image, b"BM") {
        bmp(image).map(|()| Format::Bmp)
    } else {
        Err(Unsupported("neither JPEG, PNG, WebP nor BMP"))
    }
}

/// Whether the image starts with `magic`, or could once there are more bytes.
fn begins(image: &[u8], magic: &[u8]) -> bool {
    let n = image.len().min(magic.len());
    image[..n] == magic[..n]
}

fn sane(width: u64, height: u64) -> Result<(), Flaw> {
    if width == 0 || height == 0 {
        return Err(Unsupported("dimensions of zero"));
    }
    if width.saturating_mul(height) > PIXELS_MAX {
        return Err(Unsupported("dimensions beyond 100 megapixels"));
    }
    Ok(())
}

/// Walks the segments up to the first scan. The end marker counts only behind it: one before it belongs to a thumbnail.
fn jpeg(image: &[u8]) -> Result<(), Flaw> {
    const CUT: Flaw = Truncated("JPEG without its end");
    let mut at = 2;
    let mut framed = false;
    loop {
        // As decoders do: fill bytes and stray ones before a marker are passed over.
        let mut pairs = image.get(at..).unwrap_or_default().windows(2);
        let fill = pairs.position(|pair| pair[0] == 0xff && !matches!(pair[1], 0 | 0xff)).ok_or(CUT)?;
        let marker = image[at + fill + 1];
        at += fill + 2;
        match marker {
            0x01 | 0xd0..=0xd7 => continue,
            0xd8 => return Err(Unsupported("JPEG with a malformed segment")),
            0xd9 => return Err(Unsupported("JPEG without a picture")),
            _ => {}
        }
        let length = usize::from(be16(image, at).ok_or(CUT)?);
        if length < 2 {
            return Err(Unsupported("JPEG with a malformed segment"));
        }
        let segment = image.get(at + 2..at + length).ok_or(CUT)?;
        at += length;
        match marker {
            // Every start of frame; c4, c8 and cc are tables and reserved.
            0xc0..=0xc3 | 0xc5..=0xc7 | 0xc9..=0xcb | 0xcd..=0xcf => {
                let short = Unsupported("JPEG with a malformed segment");
                let (height, width) = be16(segment, 1).zip(be16(segment, 3)).ok_or(short)?;
                sane(width.into(), height.into())?;
                framed = true;
            }
            0xda if !framed => return Err(Unsupported("JPEG without a picture")),
            0xda => break,
            _ => {}
        }
    }
    // Inside a scan 0xff is always stuffed, so the pair is the end marker. Cameras append padding, metadata and even
    // films behind it: looked for from the back, where it usually is at once.
    if image[at..].windows(2).rev().any(|pair| pair == b"\xff\xd9") { Ok(()) } else { Err(CUT) }
}

/// Walks the chunks to the last one; what follows it does not matter.
fn png(image: &[u8]) -> Result<(), Flaw> {
    const CUT: Flaw = Truncated("PNG without its end");
    const MALFORMED: Flaw = Unsupported("PNG with a malformed chunk");
    let mut at = PNG_SIGNATURE.len();
    let mut first = true;
    let mut pictured = false;
    loop {
        let length = be32(image, at).ok_or(CUT)?;
        let kind = image.get(at + 4..at + 8).ok_or(CUT)?;
        if length > i32::MAX as u32 || !kind.iter().all(u8::is_ascii_alphabetic) {
            return Err(MALFORMED);
        }
        if first != (kind == b"IHDR") || (first && length != 13) {
            return Err(MALFORMED);
        }
        let end = at.checked_add(PNG_CHUNK_OVERHEAD + length as usize).ok_or(MALFORMED)?;
        let chunk = image.get(at + 8..end).ok_or(CUT)?;
        match kind {
            b"IHDR" => {
                let (width, height) = be32(chunk, 0).zip(be32(chunk, 4)).ok_or(MALFORMED)?;
                sane(width.into(), height.into())?;
            }
            b"IDAT" => pictured = true,
            b"IEND" => return if pictured { Ok(()) } else { Err(Unsupported("PNG without a picture")) },
            _ => {}
        }
        first = false;
        at = end;
    }
}

/// Compares the container's length with the bytes, and reads the dimensions of its first chunk.
fn webp(image: &[u8]) -> Result<(), Flaw> {
    const CUT: Flaw = Truncated("WebP shorter than it says");
    const MALFORMED: Flaw = Unsupported("WebP with a malformed header");
    if !begins(image.get(8..).unwrap_or_default(), b"WEBP") {
        return Err(Unsupported("a RIFF file, but no WebP"));
    }
    let length = le32(image, 4).ok_or(CUT)? as usize;
    let whole = image.get(..length.checked_add(8).ok_or(MALFORMED)?).ok_or(CUT)?;
    let kind = whole.get(RIFF_HEADER_BYTES..RIFF_HEADER_BYTES + 4).ok_or(MALFORMED)?;
    let chunk_bytes = le32(whole, RIFF_HEADER_BYTES + 4).ok_or(MALFORMED)? as usize;
    let chunk = whole[RIFF_HEADER_BYTES + 8..].get(..chunk_bytes).ok_or(MALFORMED)?;
    let (width, height) = match kind {
        b"VP8 " if chunk.get(3..6) == Some(b"\x9d\x01\x2a") => {
            le16(chunk, 6).zip(le16(chunk, 8)).map(|(w, h)| (u32::from(w & 0x3fff), u32::from(h & 0x3fff)))
        }
        b"VP8L" if chunk.first() == Some(&0x2f) => {
            le32(chunk, 1).map(|bits| ((bits & 0x3fff) + 1, (bits >> 14 & 0x3fff) + 1))
        }
        // 24 bits each: read with the byte before, which is shifted out.
        b"VP8X" => le32(chunk, 3).zip(le32(chunk, 6)).map(|(w, h)| ((w >> 8) + 1, (h >> 8) + 1)),
        _ => None,
    }
    .ok_or(MALFORMED)?;
    sane(width.into(), height.into())
}

/// Compares the bytes with the length that the header says, and with the one that its dimensions ask for.
fn bmp(image: &[u8]) -> Result<(), Flaw> {
    const CUT: Flaw = Truncated("BMP shorter than it says");
    const MALFORMED: Flaw = Unsupported("BMP with a malformed header");
    let stated = le32(image, 2).ok_or(CUT)?;
    let offset = le32(image, 10).ok_or(CUT)?;
    let header_bytes = le32(image, BMP_FILE_HEADER_BYTES).ok_or(CUT)?;
    if !matches!(header_bytes, 12 | 40 | 52 | 56 | 64 | 108 | 124) {
        return Err(MALFORMED);
    }
    let header = image.get(BMP_FILE_HEADER_BYTES..BMP_FILE_HEADER_BYTES + header_bytes as usize).ok_or(CUT)?;
    let field = |at| le32(header, at).ok_or(MALFORMED);
    let half = |at| le16(header, at).map(u64::from).ok_or(MALFORMED);
    let (width, height, planes, depth, compression, stated_pixels) = if header_bytes == 12 {
        (half(4)?, half(6)?, half(8)?, half(10)?, 0, 0)
    } else {
        // A negative height means rows from the top; a negative width means nothing.
        let height = field(8)?.cast_signed().unsigned_abs();
        let width = u32::try_from(field(4)?.cast_signed()).map_err(|_| MALFORMED)?;
        (width.into(), height.into(), half(12)?, half(14)?, field(16)?, field(20)?)
    };
    if planes != 1 || !matches!(depth, 1 | 4 | 8 | 16 | 24 | 32) || offset < 14 + header_bytes {
        return Err(MALFORMED);
    }
    sane(width, height)?;
    let pixels = match compression {
        0 | 3 | 6 => (width * depth).div_ceil(32) * 4 * height,
        1 | 2 => stated_pixels.into(),
        _ => return Err(Unsupported("BMP with an unknown compression")),
    };
    // Writers that stream leave the stated length at zero.
    if (image.len() as u64) < (u64::from(offset) + pixels).max(stated.into()) { Err(CUT) } else { Ok(()) }
}

fn array<const N: usize>(bytes: &[u8], at: usize) -> Option<[u8; N]> {
    bytes.get(at..)?.first_chunk().copied()
}

fn be16(bytes: &[u8], at: usize) -> Option<u16> {
    array(bytes, at).map(u16::from_be_bytes)
}

fn be32(bytes: &[u8], at: usize) -> Option<u32> {
    array(bytes, at).map(u32::from_be_bytes)
}

fn le16(bytes: &[u8], at: usize) -> Option<u16> {
    array(bytes, at).map(u16::from_le_bytes)
}

fn le32(bytes: &[u8], at: usize) -> Option<u32> {
    array(bytes, at).map(u32::from_le_bytes)
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;
    use proptest::prelude::*;

    pub(crate) fn a_jpeg() -> Vec<u8> {
        drawn(false)
    }

    fn drawn(progressive: bool) -> Vec<u8> {
        let mut jpeg = Vec::new();
        let mut encoder = jpeg_encoder::Encoder::new(&mut jpeg, 60);
        encoder.set_progressive(progressive);
        let pixels: Vec<u8> = (0..32 * 24u32).map(|n| (n.wrapping_mul(2_654_435_761) >> 24) as u8).collect();
        encoder.encode(&pixels, 32, 24, jpeg_encoder::ColorType::Luma).unwrap();
        jpeg
    }

    /// The JPEG with a thumbnail (a whole JPEG, with its end) in its EXIF segment.
    fn with_thumbnail() -> Vec<u8> {
        let inner = [b"Exif\0\0".as_slice(), &a_jpeg()].concat();
        let length = u16::try_from(inner.len() + 2).unwrap().to_be_bytes();
        [b"\xff\xd8\xff\xe1".as_slice(), &length, &inner, &a_jpeg()[2..]].concat()
    }

    fn chunk(kind: &[u8], data: &[u8]) -> Vec<u8> {
        // The checksum is not looked at.
        [&u32::try_from(data.len()).unwrap().to_be_bytes(), kind, data, b"\0\0\0\0"].concat()
    }

    fn png_of(width: u32, height: u32) -> Vec<u8> {
        let header = [&width.to_be_bytes()[..], &height.to_be_bytes(), b"\x08\0\0\0\0"].concat();
        [PNG_SIGNATURE, &chunk(b"IHDR", &header), &chunk(b"IDAT", b"\x78\x9c\x62"), &chunk(b"IEND", b"")].concat()
    }

    fn webp_of(kind: &[u8], data: &[u8]) -> Vec<u8> {
        let length = u32::try_from(data.len()).unwrap();
        [b"RIFF", &(length + 12).to_le_bytes()[..], b"WEBP", kind, &length.to_le_bytes(), data].concat()
    }

    fn bmp_of(width: i32, height: i32, stated: bool) -> Vec<u8> {
        let row = (width.unsigned_abs() as usize * 24).div_ceil(32) * 4;
        let pixels = vec![7; (row * height.unsigned_abs() as usize).min(4096)];
        let size = if stated { 54 + u32::try_from(pixels.len()).unwrap() } else { 0 };
        let mut bmp = [b"BM", &size.to_le_bytes()[..], &[0; 4], &54u32.to_le_bytes(), &40u32.to_le_bytes()].concat();
        bmp.extend([width.to_le_bytes(), height.to_le_bytes()].concat());
        bmp.extend(b"\x01\0\x18\0");
        bmp.extend([0; 24]);
        bmp.extend(pixels);
        bmp
    }

    fn corpus() -> Vec<(&'static str, Format, Vec<u8>)> {
        vec![
            ("baseline", Format::Jpeg, a_jpeg()),
            ("progressive", Format::Jpeg, drawn(true)),
            ("thumbnail", Format::Jpeg, with_thumbnail()),
            ("stray bytes", Format::Jpeg, [b"\xff\xd8\xff\xfe\0\x02\0\xff\0\xff\xff", &a_jpeg()[3..]].concat()),
            ("png", Format::Png, png_of(3, 2)),
            ("lossy", Format::WebP, webp_of(b"VP8 ", b"\0\0\0\x9d\x01\x2a\x03\0\x02\0\0\0")),
            ("lossless", Format::WebP, webp_of(b"VP8L", b"\x2f\0\0\0\x10\x07\x10\x11\x11\x88\x88\xfe\x07\0")),
            ("extended", Format::WebP, webp_of(b"VP8X", b"\0\0\0\0\x03\0\0\x02\0\0")),
            ("bmp", Format::Bmp, bmp_of(3, 2, true)),
            ("top-down, length not stated", Format::Bmp, bmp_of(3, -2, false)),
        ]
    }

    #[test]
    fn whole_images_pass_also_with_trailing_bytes() {
        for (name, format, image) in corpus() {
            assert_eq!(inspect(&image), Ok(format), "{name}");
            let padded = [image.as_slice(), &vec![0; 70_000]].concat();
            assert_eq!(inspect(&padded), Ok(format), "{name} with padding behind its end");
        }
    }

    #[test]
    fn every_prefix_is_truncated() {
        for (name, _, image) in corpus() {
            for n in 0..image.len() {
                let found = inspect(&image[..n]);
                assert!(matches!(found, Err(Truncated(_))), "{name}: {n} of {} bytes: {found:?}", image.len());
            }
        }
        assert_eq!(inspect(b""), Err(Truncated("empty")));
        assert!(matches!(inspect(b"\xff"), Err(Truncated(_))));
    }

    #[test]
    fn what_more_bytes_cannot_mend_is_unsupported() {
        let zero_jpeg = {
            let mut jpeg = a_jpeg();
            let frame = jpeg.windows(2).position(|pair| pair == b"\xff\xc0").unwrap();
            jpeg[frame + 5..frame + 7].fill(0);
            jpeg
        };
        let bitmap_depth = {
            let mut bmp = bmp_of(3, 2, true);
            bmp[28] = 25;
            bmp
        };
        for (name, image) in [
            ("text", b"hello, world".to_vec()),
            ("gif", b"GIF89a\x01\0\x01\0".to_vec()),
            ("a single other byte", b"G".to_vec()),
            ("wave", b"RIFF\x04\0\0\0WAVE".to_vec()),
            ("JPEG of no height", zero_jpeg),
            ("JPEG with only a thumbnail's end", b"\xff\xd8\xff\xd9".to_vec()),
            ("JPEG segment of length 1", b"\xff\xd8\xff\xe0\0\x01".to_vec()),
            ("PNG bomb", png_of(100_000, 100_000)),
            ("PNG of no width", png_of(0, 2)),
            ("PNG without IDAT", [&png_of(1, 1)[..33], &chunk(b"IEND", b"")].concat()),
            ("PNG starting with another chunk", [PNG_SIGNATURE, &chunk(b"tEXt", b"")].concat()),
            ("WebP of another kind", webp_of(b"ALPH", b"0123456789")),
            ("WebP bomb", webp_of(b"VP8X", b"\0\0\0\0\xff\xff\xff\xff\xff\xff")),
            ("BMP bomb", bmp_of(i32::MAX, i32::MIN, false)),
            ("BMP of a strange depth", bitmap_depth),
            ("text that starts with BM", b"BMW, the car, is no bitmap at all".to_vec()),
        ] {
            let found = inspect(&image);
            assert!(matches!(found, Err(Unsupported(_))), "{name}: {found:?}");
        }
    }

    #[test]
    fn a_file_whose_tail_was_never_written_is_truncated() {
        let mut jpeg = with_thumbnail();
        let half = jpeg.len() - 40;
        jpeg[half..].fill(0);
        assert!(matches!(inspect(&jpeg), Err(Truncated(_))));
    }

    proptest! {
        #[test]
        fn no_bytes_panic(which in 0usize..5, mut bytes in proptest::collection::vec(any::<u8>(), 0..400)) {
            let magic: &[u8] = [b"", b"\xff\xd8\xff".as_slice(), PNG_SIGNATURE, b"RIFF\x20\0\0\0WEBPVP8 ", b"BM"][which];
            bytes.splice(0..0, magic.iter().copied());
            drop(inspect(&bytes).map_err(|flaw| format!("{flaw:?}")));
        }

        #[test]
        fn no_flipped_bits_panic(which in 0usize..10, flips in proptest::collection::vec((any::<usize>(), 0u8..8), 1..8)) {
            let mut image = corpus().swap_remove(which).2;
            for (at, bit) in flips {
                let at = at % image.len().min(200);
                image[at] ^= 1 << bit;
            }
            drop(inspect(&image).map_err(|flaw| format!("{flaw:?}")));
        }
    }
}
