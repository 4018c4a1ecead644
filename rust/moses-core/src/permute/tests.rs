#![allow(clippy::arithmetic_side_effects)] // of small numbers

use super::element::LANES;
use super::*;
use half::{bf16, f16};
use proptest::prelude::*;

fn numbers(count: usize, seed: u32) -> Vec<f32> {
    let mut state = seed.wrapping_mul(2_654_435_761).wrapping_add(1);
    (0..count)
        .map(|_| {
            state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
            (state >> 8) as f32 / (1 << 22) as f32 - 2.0
        })
        .collect()
}

/// A plan that drops every seventh pair and leaves one row empty.
fn plan_of(tokens: usize, top_k: usize) -> (Vec<i32>, Vec<i32>) {
    let pairs = tokens * top_k;
    let mut inverse = vec![-1; pairs];
    let mut order = vec![-1];
    for pair in (0..pairs).rev() {
        if pair % 7 != 3 {
            inverse[pair] = order.len() as i32;
            order.push(pair as i32);
        }
    }
    (order, inverse)
}

macro_rules! check {
    ($name:ident, $type:ty, $sum:ty, $of:expr, $to:expr) => {
        #[test]
        fn $name() {
            for (tokens, top_k, width) in [(1, 1, 1), (5, 2, 3), (9, 3, 33), (40, 2, 300), (300, 2, 257)] {
                let (order, inverse) = plan_of(tokens, top_k);
                let plan = Plan { order: &order, inverse: &inverse, top_k };
                let (of, to): (fn(f32) -> $type, fn($type) -> $sum) = ($of, $to);
                let y: Vec<$type> = numbers(order.len() * width, 1).into_iter().map(of).collect();
                let grad: Vec<$type> = numbers(tokens * width, 2).into_iter().map(of).collect();
                let weights: Vec<$sum> = numbers(tokens * top_k, 3).into_iter().map(<$sum>::from).collect();
                for threads in [1, 2, 4, 16] {
                    let mut out = vec![of(9.0); tokens * width];
                    combine(&y, width, &plan, Some(&weights), &mut out, threads).unwrap();
                    let mut plain = vec![of(9.0); tokens * width];
                    combine(&y, width, &plan, None, &mut plain, threads).unwrap();
                    let mut rows = vec![of(9.0); order.len() * width];
                    combine_backward_rows(&grad, width, &plan, &weights, &mut rows, threads).unwrap();
                    let mut dots = vec![9.0 as $sum; tokens * top_k];
                    combine_backward_weights(&grad, &y, width, &plan, &mut dots, threads).unwrap();
                    for token in 0..tokens {
                        for d in 0..width {
                            let (mut sum, mut unit) = (0.0 as $sum, 0.0 as $sum);
                            for pair in token * top_k..(token + 1) * top_k {
                                if inverse[pair] >= 0 {
                                    let item = to(y[inverse[pair] as usize * width + d]);
                                    sum += weights[pair] * item;
                                    unit += item;
                                }
                            }
                            assert_eq!(to(out[token * width + d]).to_bits(), to(of_sum(sum)).to_bits());
                            assert_eq!(to(plain[token * width + d]).to_bits(), to(of_sum(unit)).to_bits());
                        }
                    }
                    for (row, &pair) in order.iter().enumerate() {
                        for d in 0..width {
                            let wanted = match pair {
                                -1 => 0.0,
                                pair => weights[pair as usize] * to(grad[pair as usize / top_k * width + d]),
                            };
                            assert_eq!(to(rows[row * width + d]).to_bits(), to(of_sum(wanted)).to_bits());
                        }
                    }
                    for (pair, dot) in dots.iter().enumerate() {
                        let mut lanes = [0.0 as $sum; LANES];
                        if inverse[pair] >= 0 {
                            for d in 0..width {
                                lanes[d % LANES] +=
                                    to(grad[pair / top_k * width + d]) * to(y[inverse[pair] as usize * width + d]);
                            }
                        }
                        for half in [16, 8, 4, 2, 1] {
                            for lane in 0..half {
                                lanes[lane] += lanes[lane + half];
                            }
                        }
                        assert_eq!(dot.to_bits(), lanes[0].to_bits());
                    }
                }
                fn of_sum(sum: $sum) -> $type {
                    Round::round(sum)
                }
            }
        }
    };
}

trait Round<T> {
    fn round(self) -> T;
}
impl Round<f32> for f32 {
    fn round(self) -> f32 {
        self
    }
}
impl Round<f64> for f64 {
    fn round(self) -> f64 {
        self
    }
}
impl Round<bf16> for f32 {
    fn round(self) -> bf16 {
        bf16::from_f32(self)
    }
}
impl Round<f16> for f32 {
    fn round(self) -> f16 {
        f16::from_f32(self)
    }
}

check!(float32_is_the_plain_loop, f32, f32, |x| x, |x| x);
check!(float64_is_the_plain_loop, f64, f64, f64::from, |x| x);
check!(bfloat16_is_the_plain_loop, bf16, f32, bf16::from_f32, bf16::to_f32);
check!(float16_is_the_plain_loop, f16, f32, f16::from_f32, f16::to_f32);

#[test]
fn infinities_and_nans_stay_what_they_are() {
    let plan = Plan { order: &[0], inverse: &[0], top_k: 1 };
    for special in [f32::INFINITY, f32::NEG_INFINITY, f32::NAN, f32::MAX, f32::MIN_POSITIVE, -0.0, 1.5e-39] {
        let mut out = [bf16::ONE];
        combine(&[bf16::from_f32(special)], 1, &plan, Some(&[1.0]), &mut out, 1).unwrap();
        let wanted = bf16::from_f32(0.0 + special);
        assert!(out[0] == wanted || (out[0].is_nan() && wanted.is_nan()), "{special} became {}", out[0]);
    }
}

proptest! {
    #[test]
    fn gather_copies_rows(tokens in 1_usize..20, top_k in 1_usize..4, bytes in 0_usize..40, threads in 1_usize..5) {
        let (order, inverse) = plan_of(tokens, top_k);
        let plan = Plan { order: &order, inverse: &inverse, top_k };
        let x: Vec<u8> = (0..tokens * bytes).map(|i| i as u8).collect();
        let mut out = vec![77; order.len() * bytes];
        gather(&x, bytes, &plan, &mut out, threads).unwrap();
        for (row, &pair) in order.iter().enumerate() {
            let found = &out[row * bytes..(row + 1) * bytes];
            match pair {
                -1 => prop_assert!(found.iter().all(|byte| *byte == 0)),
                pair => prop_assert_eq!(found, &x[pair as usize / top_k * bytes..(pair as usize / top_k + 1) * bytes]),
            }
        }
    }

    #[test]
    fn any_plan_is_an_error_or_a_result(
        order in prop::collection::vec(any::<i32>(), 0..6),
        inverse in prop::collection::vec(-3_i32..8, 0..6),
        top_k in 0_usize..4,
        width in 0_usize..3,
    ) {
        let plan = Plan { order: &order, inverse: &inverse, top_k };
        let tokens = inverse.len().checked_div(top_k).unwrap_or(0);
        let (y, grad) = (vec![1.0_f32; order.len() * width], vec![1.0_f32; tokens * width]);
        let weights = vec![1.0_f32; inverse.len()];
        let mut bytes = vec![0; order.len() * width * 4];
        let _ = gather(bytemuck::cast_slice(&grad), width * 4, &plan, &mut bytes, 1);
        let _ = combine(&y, width, &plan, Some(&weights), &mut grad.clone(), 1);
        let _ = combine_backward_rows(&grad, width, &plan, &weights, &mut y.clone(), 1);
        let _ = combine_backward_weights(&grad, &y, width, &plan, &mut weights.clone(), 1);
    }
}

#[test]
fn what_does_not_fit_is_named() {
    let plan = Plan { order: &[0, 1], inverse: &[0, 1], top_k: 1 };
    let code = |result: Result<()>| result.unwrap_err().code();
    assert_eq!(code(gather(&[0; 3], 2, &plan, &mut [0; 4], 1)), "dispatch_arguments");
    assert_eq!(code(gather(&[0; 4], 2, &plan, &mut [0; 5], 1)), "dispatch_arguments");
    assert_eq!(code(combine(&[0.0_f32; 3], 2, &plan, None, &mut [0.0; 4], 1)), "dispatch_arguments");
    assert_eq!(code(combine(&[0.0_f32; 4], 2, &plan, Some(&[1.0]), &mut [0.0; 4], 1)), "dispatch_arguments");
    let wrong = Plan { order: &[0, 2], inverse: &[0, -2], top_k: 1 };
    assert_eq!(code(gather(&[0; 4], 2, &wrong, &mut [0; 4], 1)), "plan_index");
    let error = combine(&[0.0_f32; 4], 2, &wrong, None, &mut [0.0; 4], 1).unwrap_err();
    assert_eq!(
        error.to_string(),
        "the plan's inverse[1] is -2 where -1 to 2 - 1 is allowed: make plans with dispatch_plan"
    );
    assert_eq!(code(combine_backward_rows(&[0.0_f32; 4], 2, &wrong, &[1.0; 2], &mut [0.0; 4], 1)), "plan_index");
    assert_eq!(code(combine_backward_weights(&[0.0_f32; 4], &[0.0; 4], 2, &wrong, &mut [0.0; 2], 1)), "plan_index");
}
