#!/usr/bin/env bash
# Builds target/candle/release/candle-peer: candle for paired CPU timings, with the versions of its Cargo.lock and the
# instruction set of this processor, as its users build it.
set -euo pipefail

here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
RUSTFLAGS="-C target-cpu=native" cargo build --release --locked --manifest-path "$here/candle/Cargo.toml" \
  --target-dir "$here/../../target/candle"
