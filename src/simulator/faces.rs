//! Drawn faces: JPEGs that look like what a detector sends, without anybody's picture. Not random bytes: they are real, decodable images.

use fastrand::Rng;
use jpeg_encoder::{ColorType, Encoder};

/// Smallest and largest side of a drawn image, pixels.
const SIDE: (u16, u16) = (48, 1600);
/// JPEG quality: what cameras use.
const QUALITY: u8 = 85;
/// How many times the size is corrected.
const CORRECTIONS: usize = 4;

/// A drawn face, about `approx_bytes` large. The same seed and size give the same bytes, another seed another face.
pub fn face(seed: u64, approx_bytes: usize) -> Vec<u8> {
    let target = approx_bytes.max(1) as f64;
    let mut side = (target / 0.35).sqrt();
    let mut best = Vec::new();
    for _ in 0..CORRECTIONS {
        let pixels = clamp_side(side);
        let image = encode(&draw(&mut Rng::with_seed(seed), pixels), pixels);
        let ratio = target / image.len() as f64;
        let nearer = |bytes: &[u8]| (bytes.len() as f64 - target).abs();
        if best.is_empty() || nearer(&image) < nearer(&best) {
            best = image;
        }
        if (0.95..1.05).contains(&ratio) {
            break;
        }
        side = f64::from(pixels) * ratio.sqrt();
    }
    best
}

/// `base`, a JPEG, with a comment of its own for each `n`: a different, still valid image at the price of a copy.
pub fn face_variant(base: &[u8], n: u64) -> Vec<u8> {
    let comment = format!("framegate {n:020}");
    let length = u16::try_from(comment.len() + 2).expect("a short comment");
    let (start, rest) = base.split_at(2); // SOI
    let mut image = Vec::with_capacity(base.len() + comment.len() + 4);
    image.extend_from_slice(start);
    image.extend_from_slice(&[0xff, 0xfe]); // COM
    image.extend_from_slice(&length.to_be_bytes());
    image.extend_from_slice(comment.as_bytes());
    image.extend_from_slice(rest);
    image
}

#[expect(clippy::cast_possible_truncation, clippy::cast_sign_loss, reason = "clamped to a small positive range")]
fn clamp_side(side: f64) -> u16 {
    side.clamp(f64::from(SIDE.0), f64::from(SIDE.1)) as u16
}

fn encode(pixels: &[u8], side: u16) -> Vec<u8> {
    let mut image = Vec::new();
    Encoder::new(&mut image, QUALITY)
        .encode(pixels, side, side, ColorType::Rgb)
        .expect("the pixels are as many as the sides say");
    image
}

type Colour = [u8; 3];

/// What differs from face to face.
struct Features {
    skin: Colour,
    hair: Colour,
    iris: Colour,
    lips: Colour,
    wall: Colour,
    width: f32,
    hairline: f32,
    eyes_apart: f32,
    smile: f32,
}

impl Features {
    fn draw(rng: &mut Rng) -> Self {
        let skins = [[244, 208, 177], [224, 172, 138], [190, 135, 98], [141, 92, 62], [92, 58, 40]];
        let hairs = [[30, 24, 20], [76, 48, 30], [150, 104, 60], [214, 184, 120], [160, 160, 164]];
        let irises = [[60, 92, 130], [86, 60, 36], [70, 110, 70]];
        let one = |rng: &mut Rng, from: &[Colour]| {
            let colour = from[rng.usize(..from.len())];
            colour.map(|channel| channel.saturating_add(rng.u8(..24)))
        };
        let skin = one(rng, &skins);
        Self {
            skin,
            hair: one(rng, &hairs),
            iris: one(rng, &irises),
            lips: [skin[0].saturating_sub(30), skin[1].saturating_sub(80), skin[2].saturating_sub(60)],
            wall: [rng.u8(80..200), rng.u8(80..200), rng.u8(80..200)],
            width: 0.27 + rng.f32() * 0.06,
            hairline: -0.16 - rng.f32() * 0.12,
            eyes_apart: 0.10 + rng.f32() * 0.035,
            smile: rng.f32() * 0.8 - 0.2,
        }
    }

    /// The colour at a place, both coordinates from -0.5 to 0.5.
    fn at(&self, x: f32, y: f32) -> Colour {
        let oval = |cx: f32, cy: f32, rx: f32, ry: f32| ((x - cx) / rx).powi(2) + ((y - cy) / ry).powi(2);
        let eye = (x.abs() - self.eyes_apart, y + 0.05);
        let mouth = y - 0.19 + self.smile * x * x * 4.0;
        let shade = 1.0 - 0.35 * oval(0.08, -0.05, 0.5, 0.6).min(1.0);
        if oval(0.0, 0.02, self.width, 0.37) < 1.0 {
            if y < self.hairline {
                return self.hair;
            }
            if eye.0.hypot(eye.1) < 0.012 {
                return [12, 12, 14];
            }
            if eye.0.hypot(eye.1) < 0.024 {
                return self.iris;
            }
            if (eye.0 / 0.05).powi(2) + (eye.1 / 0.026).powi(2) < 1.0 {
                return [238, 238, 236];
            }
            if eye.0.abs() < 0.055 && (y + 0.11 + eye.0.abs() * 0.2).abs() < 0.009 {
                return self.hair;
            }
            if x.abs() < 0.09 && mouth.abs() < 0.02 - x.abs() * 0.12 {
                return self.lips;
            }
            if (y - 0.09).abs() < 0.008 && x.abs() < 0.03 {
                return dim(self.skin, 0.7);
            }
            return dim(self.skin, shade);
        }
        if oval(0.0, -0.05, self.width + 0.05, 0.4) < 1.0 && y < 0.1 {
            return dim(self.hair, 0.9);
        }
        if oval(0.0, 0.62, 0.42, 0.28) < 1.0 {
            return dim(self.wall, 0.4);
        }
        dim(self.wall, 1.0 - 0.3 * (y + 0.5))
    }
}

#[expect(clippy::cast_possible_truncation, clippy::cast_sign_loss, reason = "a float to u8 cast saturates")]
fn dim(colour: Colour, by: f32) -> Colour {
    colour.map(|channel| (f32::from(channel) * by) as u8)
}

fn draw(rng: &mut Rng, side: u16) -> Vec<u8> {
    let features = Features::draw(rng);
    let mut pixels = Vec::with_capacity(usize::from(side) * usize::from(side) * 3);
    for row in 0..side {
        let y = f32::from(row) / f32::from(side) - 0.5;
        for column in 0..side {
            let x = f32::from(column) / f32::from(side) - 0.5;
            let grain = rng.u8(..24); // a sensor's noise: what gives the file its size
            pixels.extend(features.at(x, y).map(|channel| channel.saturating_add(grain).saturating_sub(12)));
        }
    }
    pixels
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn faces_have_the_size_asked_for_and_are_each_their_own() {
        for bytes in [8_000, 40_000, 200_000] {
            let image = face(7, bytes);
            assert!((bytes * 8 / 10..bytes * 12 / 10).contains(&image.len()), "{bytes}: {}", image.len());
            assert!(image.starts_with(&[0xff, 0xd8, 0xff]) && image.ends_with(&[0xff, 0xd9]), "{bytes}");
        }
        assert_eq!(face(1, 8_000), face(1, 8_000));
        assert_ne!(face(1, 8_000), face(2, 8_000));
    }

    #[test]
    fn a_variant_differs_by_one_comment_only() {
        let base = face(3, 8_000);
        let (one, two) = (face_variant(&base, 1), face_variant(&base, 2));
        assert_ne!(one, two);
        assert_eq!(one[2..4], [0xff, 0xfe]);
        let length = usize::from(u16::from_be_bytes([one[4], one[5]]));
        assert_eq!(one[4 + length..], base[2..], "what follows the comment is the base");
    }
}
