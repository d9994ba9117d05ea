# Aliases, one line each; the logic is in the programs. One release build serves all of them.
.PHONY: demo demo-text test science science-full soak mutants kernels gpu gpu-kit twins bench results criterion paired docs data codegen tidy

demo:    ; cargo run --release -p graft-engine --bin graft -- run assets/fashion-dit/demo.toml --run demo
demo-text: ; cargo run --release -p graft-engine --bin graft -- run assets/emoji-pixart/graft.toml --run runs/emoji-graft
test:    ; python3 tools/setup/cuda_compiler.py --try && cargo test --release --workspace
science: ; python3 tools/setup/fetch_data.py fashion-mnist && cargo run --release -p graft-engine --bin graft -- science assets/fashion-dit/science.toml --run runs/science --publish docs/science
science-full: ; python3 tools/setup/fetch_data.py fashion-mnist && cargo run --release -p graft-engine --bin graft -- science assets/fashion-dit/science.toml --run runs/science --tier full --publish docs/science
soak:    ; GRAFT_FUZZ_SECONDS=600 cargo test --release -p graft-tests --test suite fuzz && EMU_SOAK=1 cargo test --release -p graft-tests --test emulator --test conformance
mutants: ; cargo test --release -p graft-tests --test emulator -- fault && cargo run --release -p graft-tests --bin mutants
kernels: ; python3 tools/setup/cuda_compiler.py && cargo xtask kernels && cargo xtask cubins
gpu:     ; cargo run --release -p graft-engine --bin graft -- gpu
gpu-kit: ; python3 tools/setup/gpu_kit.py target/gpu-kit
twins:   ; python3 kernels-triton-ref/check.py
bench:   ; cargo run --release -p graft-benches --bin bench
results: ; cargo run --release -p graft-engine --bin graft -- bench results
criterion: ; cargo bench -p graft-benches
paired:  ; cargo run --release -p graft-benches --bin paired -- model
docs:    ; cargo doc --release --workspace --no-deps
data:    ; python3 tools/setup/fetch_data.py
codegen: ; cargo xtask codegen
tidy:    ; cargo xtask tidy
