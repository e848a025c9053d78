# The commands that CI runs, one line each. `just` lists them.

default:
    @just --list

# Format, lints, docs, licences, and the purity of the core.
check: fmt clippy doc deny purity

fmt:
    cargo fmt --all --check

clippy:
    cargo clippy --workspace --all-targets --locked -- -D warnings

doc:
    RUSTDOCFLAGS="-D warnings" cargo doc --workspace --no-deps --document-private-items --locked

deny:
    cargo deny check

# The core has no runtime and no source of randomness beneath it.
purity:
    .ci/purity

test:
    cargo test --workspace

# Each fuzz target for so many seconds, from the committed corpus.
fuzz seconds="60":
    .ci/fuzz {{seconds}}

# Real NATs in network namespaces: needs root, and what `.ci/run` installs.
nat:
    cargo test --package peerfleet-peer --test nat

# How soon paths are direct, how long pauses are, what an idle path costs; half an hour on an idle machine, as root.
paths runs="20":
    PEERFLEET_MEASURE_RUNS={{runs}} cargo test --release --package peerfleet-peer --test nat -- \
        --ignored --nocapture --test-threads 1

docker:
    docker/test-rootfs

# Floors, ours and their ratios; about a quarter of an hour on an idle machine.
bench:
    cargo build --release --workspace
    benches/run
