#![allow(clippy::arithmetic_side_effects)] // of small numbers

use super::*;
use proptest::prelude::*;

struct Made {
    order: Vec<i32>,
    inverse: Vec<i32>,
    offsets: Vec<i64>,
    counts: Vec<i64>,
}

fn make<I: ExpertId>(ids: &[I], request: &Request, threads: usize) -> Result<Made> {
    let rows = request.rows(ids.len())?;
    let mut made = Made {
        order: vec![-7; rows],
        inverse: vec![-7; ids.len()],
        offsets: vec![-7; request.num_experts + 1],
        counts: vec![-7; request.num_experts],
    };
    let pool = Pool::new(1 << 20);
    // free blocks of lengths that no request is a multiple of
    [3, 5, 9].into_iter().for_each(|kib| pool.give(pool.take(kib * (8 << 10) + 64).unwrap()));
    let output = Output {
        order: &mut made.order,
        inverse: &mut made.inverse,
        offsets: &mut made.offsets,
        counts: &mut made.counts,
    };
    plan(ids, request, output, threads, &pool)?;
    Ok(made)
}

/// The same by sorting.
fn reference(ids: &[i64], request: &Request) -> Made {
    let experts = request.num_experts;
    let mut lists: Vec<Vec<i32>> = vec![Vec::new(); experts];
    let mut inverse = vec![-1; ids.len()];
    for (pair, &id) in ids.iter().enumerate() {
        let list = &mut lists[id as usize];
        if request.capacity.is_none_or(|capacity| list.len() < capacity) {
            list.push(pair as i32);
        }
    }
    let (mut order, mut offsets) = (Vec::new(), vec![0]);
    for list in &lists {
        for pair in list {
            inverse[*pair as usize] = order.len() as i32;
            order.push(*pair);
        }
        if request.pad {
            order.resize(offsets.len() * request.capacity.unwrap(), -1);
        }
        offsets.push(order.len() as i64);
    }
    order.resize(request.rows(ids.len()).unwrap(), -1);
    Made { order, inverse, offsets, counts: lists.iter().map(|list| list.len() as i64).collect() }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 64, ..ProptestConfig::default() })]

    #[test]
    fn a_plan_is_a_stable_sort_for_any_number_of_threads(
        (experts, top_k, ids) in (1_usize..40, 1_usize..4).prop_flat_map(|(experts, top_k)| {
            (Just(experts), Just(top_k), prop::collection::vec(0..experts as i64, 0..60))
        }),
        capacity in prop::option::of(1_usize..6),
        pad in any::<bool>(),
        threads in 1_usize..17,
        repeat in prop_oneof![8 => Just(1_usize), 2 => Just(2500)],
    ) {
        let ids: Vec<i64> = ids.repeat(repeat);
        let ids = &ids[..ids.len() / top_k * top_k];
        let request = Request { num_experts: experts, top_k, capacity, pad: pad && capacity.is_some() };
        let wanted = reference(ids, &request);
        let found = make(ids, &request, threads).unwrap();
        prop_assert_eq!(&found.order, &wanted.order);
        prop_assert_eq!(&found.inverse, &wanted.inverse);
        prop_assert_eq!(&found.offsets, &wanted.offsets);
        prop_assert_eq!(&found.counts, &wanted.counts);
        let narrow: Vec<u8> = ids.iter().map(|id| *id as u8).collect();
        prop_assert_eq!(make(&narrow, &request, threads).unwrap().order, wanted.order);
    }
}

#[test]
fn stages_of_any_length_are_written_whole() {
    for experts in [1_usize, 7, 64, 300] {
        let ids: Vec<i64> = (0..STAGED_PAIRS * 4 + 77).map(|pair| (pair * pair / 3 % experts) as i64).collect();
        let request = Request { num_experts: experts, top_k: 1, capacity: None, pad: false };
        let wanted = reference(&ids, &request);
        for threads in [1, 2, 4, 16] {
            let found = make(&ids, &request, threads).unwrap();
            assert!(found.order == wanted.order && found.inverse == wanted.inverse, "{experts} {threads}");
        }
    }
}

#[test]
fn more_experts_than_16_bits_hold() {
    let request = Request { num_experts: 70_000, top_k: 1, capacity: None, pad: false };
    let ids: Vec<i64> = (0..70_000).rev().collect();
    let found = make(&ids, &request, 2).unwrap();
    assert_eq!(found.order, (0..70_000).rev().collect::<Vec<i32>>());
}

#[test]
fn an_id_that_is_no_expert_is_named() {
    let request = Request { num_experts: 3, top_k: 2, capacity: None, pad: false };
    for bad in [3_i64, -1, i64::MIN, i64::MAX] {
        let error = make(&[0, 1, 2, 0, bad, 7], &request, 1).err().unwrap();
        assert_eq!(error.code(), "expert_id_range");
        assert!(error.to_string().starts_with(&format!("token 2, slot 0 names expert {bad} of 3")), "{error}");
    }
    let mut many = vec![1_i64; 100_000];
    many[70_001] = 3;
    assert!(make(&many, &request, 4).err().unwrap().to_string().contains("token 35000, slot 1"));
}

#[test]
fn requests_that_contradict_themselves_are_errors() {
    let fine = Request { num_experts: 3, top_k: 2, capacity: None, pad: false };
    for bad in [
        Request { num_experts: 0, ..fine },
        Request { num_experts: MAX_PLAN_EXPERTS + 1, ..fine },
        Request { top_k: 0, ..fine },
        Request { top_k: 3, ..fine },
        Request { capacity: Some(0), ..fine },
        Request { pad: true, ..fine },
        Request { capacity: Some(usize::MAX), pad: true, ..fine },
    ] {
        assert_eq!(make(&[0_i64, 1, 2, 0], &bad, 1).err().unwrap().code(), "dispatch_arguments", "{bad:?}");
    }
    let pool = Pool::new(0);
    let output = Output { order: &mut [], inverse: &mut [], offsets: &mut [], counts: &mut [] };
    assert_eq!(plan(&[0_i64, 1], &fine, output, 1, &pool).unwrap_err().code(), "dispatch_arguments");
}
