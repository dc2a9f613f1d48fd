//! Tests the bytes of each frame, and the rejection of malformed frames.

use proptest::prelude::*;

use super::header::{BATCH_OFFSET, HEADER, Header};
use super::preamble::{PREAMBLE_LENGTH, preamble, preamble_version};
use super::*;
use crate::types::endpoint::{BindAddress, Endpoint, Kind, Parking};
use crate::types::protocol::{MAX_BODY, VERSION};
use crate::types::worker_id::WorkerId;

fn bytes(frame: &impl Frame, fds: usize) -> Vec<u8> {
    let mut out = Vec::new();
    frame.encode(fds, &mut out);
    out
}

fn decode<F: Frame>(bytes: &[u8]) -> Result<F, FrameError> {
    let (header, body) = bytes.split_first_chunk().ok_or(FrameError::Body(0))?;
    let header = Header::decode(*header)?;
    if header.length != body.len() {
        return Err(FrameError::Body(0));
    }
    F::decode(header.kind, header.fds, body)
}

const H: HandleId = HandleId(0x0102_0304);

fn listen(kind: Kind, address: BindAddress) -> ToMaster {
    let endpoint = Endpoint { kind, address };
    ToMaster::Listen {
        request: 5,
        key: HandleKey { endpoint, index: 1 },
        flags: BindFlags {
            backlog: 511,
            ipv6_only: true,
            parking: Parking {
                idle_seconds: Some(10),
                first_data_seconds: Some(3),
                wait_for_data: Some(false),
            },
            ..BindFlags::default()
        },
    }
}

/// The bytes from the version to the seconds for the first data, which all `Listen` frames of these
/// tests share.
const LISTEN: [u8; 25] = [
    3, 2, 0, 0, 5, 0, 0, 0, 1, 0, 0, 0, 255, 1, 0, 0, 177, 10, 0, 0, 0, 3, 0, 0, 0,
];

fn to_master() -> Vec<(ToMaster, Vec<u8>)> {
    let ip = |text: &str| BindAddress::Ip(text.parse().unwrap());
    let mut v6 = vec![0, 6, 64, 31];
    v6.extend([0; 15]);
    v6.push(1);
    v6.extend([0; 8]);
    let listens = [
        (
            Kind::Tcp,
            ip("127.0.0.1:8000"),
            vec![0, 4, 64, 31, 127, 0, 0, 1],
        ),
        (Kind::Tcp, ip("[::1]:8000"), v6),
        (Kind::Tcp, BindAddress::Port(8000), vec![0, 1, 64, 31]),
        (
            Kind::Unix,
            BindAddress::Path("/a".into()),
            vec![1, 3, 2, 0, b'/', b'a'],
        ),
        (Kind::Udp, BindAddress::Fd(3), vec![2, 2, 3, 0, 0, 0]),
    ];
    let listens = listens.map(|(kind, address, end)| {
        let length = u8::try_from(LISTEN.len() - 4 + end.len()).unwrap();
        let golden = [&[length, 0, 0, 0], &LISTEN[..], &end].concat();
        (listen(kind, address), golden)
    });
    let mut all = Vec::from(listens);
    all.extend(simple_to_master());
    all
}

fn simple_to_master() -> Vec<(ToMaster, Vec<u8>)> {
    vec![
        (ToMaster::Online, vec![0, 0, 0, 0, 3, 1, 0, 0]),
        (
            ToMaster::Listening { handle: H },
            vec![4, 0, 0, 0, 3, 3, 0, 0, 4, 3, 2, 1],
        ),
        (
            ToMaster::Idle {
                handle: H,
                received: 3,
                open: 2,
            },
            vec![
                16, 0, 0, 0, 3, 4, 0, 0, 4, 3, 2, 1, 3, 0, 0, 0, 0, 0, 0, 0, 2, 0, 0, 0,
            ],
        ),
        (
            ToMaster::Release { handle: H },
            vec![4, 0, 0, 0, 3, 6, 0, 0, 4, 3, 2, 1],
        ),
        (ToMaster::DisconnectRequest, vec![0, 0, 0, 0, 3, 7, 0, 0]),
        (
            ToMaster::Pause { handle: H },
            vec![4, 0, 0, 0, 3, 5, 0, 0, 4, 3, 2, 1],
        ),
        (
            ToMaster::ParkAgain {
                connection: ConnectionId(7),
            },
            vec![4, 0, 0, 0, 3, 9, 0, 0, 7, 0, 0, 0],
        ),
        (
            ToMaster::Detach {
                connection: ConnectionId(7),
            },
            vec![4, 0, 0, 0, 3, 10, 0, 0, 7, 0, 0, 0],
        ),
        (
            ToMaster::Message(b"hi".to_vec()),
            vec![2, 0, 0, 0, 3, 127, 0, 0, b'h', b'i'],
        ),
    ]
}

fn to_worker() -> Vec<(ToWorker, usize, Vec<u8>)> {
    vec![
        (
            ToWorker::Reply {
                request: 5,
                result: Ok(Bound {
                    handle: H,
                    policy: SchedulingPolicy::Shared,
                    address: "127.0.0.1:8000".parse().ok(),
                }),
            },
            1,
            vec![
                20, 0, 0, 0, 3, 65, 1, 0, 5, 0, 0, 0, 0, 0, 0, 0, 4, 3, 2, 1, 1, 4, 64, 31, 127, 0,
                0, 1,
            ],
        ),
        (
            ToWorker::Reply {
                request: 5,
                result: Err(98),
            },
            0,
            vec![8, 0, 0, 0, 3, 65, 0, 0, 5, 0, 0, 0, 98, 0, 0, 0],
        ),
        (
            ToWorker::ListenerClosed {
                handle: H,
                unreceived: Unreceived::AreServed,
            },
            0,
            vec![5, 0, 0, 0, 3, 66, 0, 0, 4, 3, 2, 1, 1],
        ),
        (
            ToWorker::ListenerClosed {
                handle: H,
                unreceived: Unreceived::ParkedAreServed,
            },
            0,
            vec![5, 0, 0, 0, 3, 66, 0, 0, 4, 3, 2, 1, 2],
        ),
        (ToWorker::Disconnect, 0, vec![0, 0, 0, 0, 3, 67, 0, 0]),
        (
            ToWorker::MoveParked {
                handle: H,
                times_parked: 3,
            },
            1,
            vec![8, 0, 0, 0, 3, 68, 1, 0, 4, 3, 2, 1, 3, 0, 0, 0],
        ),
        (
            ToWorker::Message(b"hi".to_vec()),
            0,
            vec![2, 0, 0, 0, 3, 127, 0, 0, b'h', b'i'],
        ),
    ]
}

#[test]
fn frames_encode_to_fixed_bytes() {
    for (frame, golden) in to_master() {
        assert_eq!(bytes(&frame, 0), golden, "{frame:?}");
        assert_eq!(decode::<ToMaster>(&golden), Ok(frame));
    }
    for (frame, fds, golden) in to_worker() {
        assert_eq!(bytes(&frame, fds), golden, "{frame:?}");
        assert_eq!(decode::<ToWorker>(&golden), Ok(frame));
    }
}

#[test]
fn parked_connection_needs_exactly_one_descriptor() {
    let (handle, times_parked) = (H, 3);
    let park = ToMaster::Park {
        handle,
        times_parked,
    };
    let golden = [8, 0, 0, 0, 3, 8, 1, 0, 4, 3, 2, 1, 3, 0, 0, 0];
    assert_eq!(bytes(&park, 1), golden);
    let decode = |fds| ToMaster::decode(kind::PARK, fds, &golden[HEADER..]);
    assert_eq!(decode(1), Ok(park));
    for fds in [0, 2] {
        assert_eq!(decode(fds), Err(FrameError::Descriptors));
    }
}

#[test]
fn preamble_states_its_version_and_is_no_other_frame() {
    let bytes = preamble(WorkerId::new(7));
    assert_eq!(bytes, [4, 0, 0, 0, 3, 64, 1, 1, 7, 0, 0, 0]);
    assert_eq!(preamble_version(bytes), Some(VERSION));
    assert_eq!(preamble_version([1; PREAMBLE_LENGTH]), None);
    assert_eq!(
        decode::<ToWorker>(&bytes),
        Err(FrameError::Kind(kind::PREAMBLE))
    );
}

#[test]
fn truncated_body_is_an_error() {
    let golden = to_master().into_iter().map(|(_, bytes)| bytes);
    for bytes in golden.filter(|bytes| bytes[5] != kind::MESSAGE) {
        for cut in HEADER..bytes.len() {
            let mut short = bytes[..cut].to_vec();
            short[0] = u8::try_from(cut - HEADER).unwrap();
            assert_eq!(decode::<ToMaster>(&short), Err(FrameError::Body(bytes[5])));
        }
    }
}

#[test]
fn changed_byte_makes_an_error_or_another_frame() {
    for (_, bytes) in to_master() {
        for (at, value) in (0..bytes.len()).flat_map(|at| (0..=255).map(move |v| (at, v))) {
            let mut changed = bytes.clone();
            changed[at] = value;
            if let Ok(frame) = decode::<ToMaster>(&changed) {
                // Set the batch size to 0 before the comparison, because `encode` leaves the
                // batch size to the outbox.
                let batch = std::mem::take(&mut changed[BATCH_OFFSET]);
                assert!(batch == 0 || changed[6] > 0);
                assert_eq!(self::bytes(&frame, changed[6].into()), changed);
            }
        }
    }
}

#[test]
fn header_over_a_limit_is_an_error() {
    let long = [1, 0, 16, 0, VERSION, kind::MESSAGE, 0, 0];
    assert_eq!(
        Header::decode(long),
        Err(FrameError::TooLong(u32::try_from(MAX_BODY).unwrap() + 1))
    );
    let version = [0, 0, 0, 0, 4, kind::MESSAGE, 0, 0];
    assert_eq!(Header::decode(version), Err(FrameError::Version(4)));
    for (fds, batch) in [(17, 0), (17, 17), (1, 65), (0, 1), (2, 1)] {
        let header = [0, 0, 0, 0, VERSION, kind::MESSAGE, fds, batch];
        assert_eq!(Header::decode(header), Err(FrameError::Descriptors));
    }
}

#[test]
fn frame_of_the_other_direction_is_an_error() {
    for (_, bytes) in to_master() {
        if bytes[5] != kind::MESSAGE {
            assert_eq!(decode::<ToWorker>(&bytes), Err(FrameError::Kind(bytes[5])));
        }
    }
}

proptest! {
    #[test]
    fn any_bytes_decode_or_are_an_error(kind: u8, fds in 0..20usize, body: Vec<u8>) {
        let _ = ToMaster::decode(kind, fds, &body);
        let _ = ToWorker::decode(kind, fds, &body);
    }
}
