// Every PTX instruction that the kernels use, one inline function each; include this and nothing else.
//
// Rules for kernels: no assembly and no `<<<>>>` outside this folder; shared memory only through SMEM_DYNAMIC,
// SMEM_ARRAY and SmemPlan; accumulators through REG; no run-time index into constant arrays (it costs a stack frame);
// `<op>.cu` compiles for every architecture, `<op>_sm90.cu` for Hopper alone.
#pragma once
#include "base.cuh"
#include "cluster.cuh"
#include "mbarrier.cuh"
#include "memory.cuh"
#include "numbers.cuh"
#include "tma.cuh"
#include "vector.cuh"
#include "warp.cuh"
#include "wgmma.cuh"
