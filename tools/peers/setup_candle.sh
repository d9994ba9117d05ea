#!/usr/bin/env bash
# Builds the candle peer for paired CPU timings into target/candle-peer: pinned crates, some minutes on two cores.
set -euo pipefail

here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
# Its products choose their instructions when they run, the rest when it is compiled.
RUSTFLAGS="-C target-cpu=native" cargo build --release --locked \
  --manifest-path "$here/candle/Cargo.toml" --target-dir "$here/../../target/candle-peer"
