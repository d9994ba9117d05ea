// Operand lists of wgmma: what the assembler wants spelled out for every tile width. Included by wgmma.cuh alone.
//
// PTX_REGS_n is the text of the first n accumulators, PTX_OUTS_n their constraints.
#pragma once

#define PTX_REGS_4 "%0, %1, %2, %3"
#define PTX_REGS_8 PTX_REGS_4 ", %4, %5, %6, %7"
#define PTX_REGS_12 PTX_REGS_8 ", %8, %9, %10, %11"
#define PTX_REGS_16 PTX_REGS_12 ", %12, %13, %14, %15"
#define PTX_REGS_20 PTX_REGS_16 ", %16, %17, %18, %19"
#define PTX_REGS_24 PTX_REGS_20 ", %20, %21, %22, %23"
#define PTX_REGS_28 PTX_REGS_24 ", %24, %25, %26, %27"
#define PTX_REGS_32 PTX_REGS_28 ", %28, %29, %30, %31"
#define PTX_REGS_36 PTX_REGS_32 ", %32, %33, %34, %35"
#define PTX_REGS_40 PTX_REGS_36 ", %36, %37, %38, %39"
#define PTX_REGS_44 PTX_REGS_40 ", %40, %41, %42, %43"
#define PTX_REGS_48 PTX_REGS_44 ", %44, %45, %46, %47"
#define PTX_REGS_52 PTX_REGS_48 ", %48, %49, %50, %51"
#define PTX_REGS_56 PTX_REGS_52 ", %52, %53, %54, %55"
#define PTX_REGS_60 PTX_REGS_56 ", %56, %57, %58, %59"
#define PTX_REGS_64 PTX_REGS_60 ", %60, %61, %62, %63"
#define PTX_REGS_68 PTX_REGS_64 ", %64, %65, %66, %67"
#define PTX_REGS_72 PTX_REGS_68 ", %68, %69, %70, %71"
#define PTX_REGS_76 PTX_REGS_72 ", %72, %73, %74, %75"
#define PTX_REGS_80 PTX_REGS_76 ", %76, %77, %78, %79"
#define PTX_REGS_84 PTX_REGS_80 ", %80, %81, %82, %83"
#define PTX_REGS_88 PTX_REGS_84 ", %84, %85, %86, %87"
#define PTX_REGS_92 PTX_REGS_88 ", %88, %89, %90, %91"
#define PTX_REGS_96 PTX_REGS_92 ", %92, %93, %94, %95"
#define PTX_REGS_100 PTX_REGS_96 ", %96, %97, %98, %99"
#define PTX_REGS_104 PTX_REGS_100 ", %100, %101, %102, %103"
#define PTX_REGS_108 PTX_REGS_104 ", %104, %105, %106, %107"
#define PTX_REGS_112 PTX_REGS_108 ", %108, %109, %110, %111"
#define PTX_REGS_116 PTX_REGS_112 ", %112, %113, %114, %115"
#define PTX_REGS_120 PTX_REGS_116 ", %116, %117, %118, %119"
#define PTX_REGS_124 PTX_REGS_120 ", %120, %121, %122, %123"
#define PTX_REGS_128 PTX_REGS_124 ", %124, %125, %126, %127"

#define PTX_OUTS_4 "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
#define PTX_OUTS_8 PTX_OUTS_4, "+f"(d[4]), "+f"(d[5]), "+f"(d[6]), "+f"(d[7])
#define PTX_OUTS_12 PTX_OUTS_8, "+f"(d[8]), "+f"(d[9]), "+f"(d[10]), "+f"(d[11])
#define PTX_OUTS_16 PTX_OUTS_12, "+f"(d[12]), "+f"(d[13]), "+f"(d[14]), "+f"(d[15])
#define PTX_OUTS_20 PTX_OUTS_16, "+f"(d[16]), "+f"(d[17]), "+f"(d[18]), "+f"(d[19])
#define PTX_OUTS_24 PTX_OUTS_20, "+f"(d[20]), "+f"(d[21]), "+f"(d[22]), "+f"(d[23])
#define PTX_OUTS_28 PTX_OUTS_24, "+f"(d[24]), "+f"(d[25]), "+f"(d[26]), "+f"(d[27])
#define PTX_OUTS_32 PTX_OUTS_28, "+f"(d[28]), "+f"(d[29]), "+f"(d[30]), "+f"(d[31])
#define PTX_OUTS_36 PTX_OUTS_32, "+f"(d[32]), "+f"(d[33]), "+f"(d[34]), "+f"(d[35])
#define PTX_OUTS_40 PTX_OUTS_36, "+f"(d[36]), "+f"(d[37]), "+f"(d[38]), "+f"(d[39])
#define PTX_OUTS_44 PTX_OUTS_40, "+f"(d[40]), "+f"(d[41]), "+f"(d[42]), "+f"(d[43])
#define PTX_OUTS_48 PTX_OUTS_44, "+f"(d[44]), "+f"(d[45]), "+f"(d[46]), "+f"(d[47])
#define PTX_OUTS_52 PTX_OUTS_48, "+f"(d[48]), "+f"(d[49]), "+f"(d[50]), "+f"(d[51])
#define PTX_OUTS_56 PTX_OUTS_52, "+f"(d[52]), "+f"(d[53]), "+f"(d[54]), "+f"(d[55])
#define PTX_OUTS_60 PTX_OUTS_56, "+f"(d[56]), "+f"(d[57]), "+f"(d[58]), "+f"(d[59])
#define PTX_OUTS_64 PTX_OUTS_60, "+f"(d[60]), "+f"(d[61]), "+f"(d[62]), "+f"(d[63])
#define PTX_OUTS_68 PTX_OUTS_64, "+f"(d[64]), "+f"(d[65]), "+f"(d[66]), "+f"(d[67])
#define PTX_OUTS_72 PTX_OUTS_68, "+f"(d[68]), "+f"(d[69]), "+f"(d[70]), "+f"(d[71])
#define PTX_OUTS_76 PTX_OUTS_72, "+f"(d[72]), "+f"(d[73]), "+f"(d[74]), "+f"(d[75])
#define PTX_OUTS_80 PTX_OUTS_76, "+f"(d[76]), "+f"(d[77]), "+f"(d[78]), "+f"(d[79])
#define PTX_OUTS_84 PTX_OUTS_80, "+f"(d[80]), "+f"(d[81]), "+f"(d[82]), "+f"(d[83])
#define PTX_OUTS_88 PTX_OUTS_84, "+f"(d[84]), "+f"(d[85]), "+f"(d[86]), "+f"(d[87])
#define PTX_OUTS_92 PTX_OUTS_88, "+f"(d[88]), "+f"(d[89]), "+f"(d[90]), "+f"(d[91])
#define PTX_OUTS_96 PTX_OUTS_92, "+f"(d[92]), "+f"(d[93]), "+f"(d[94]), "+f"(d[95])
#define PTX_OUTS_100 PTX_OUTS_96, "+f"(d[96]), "+f"(d[97]), "+f"(d[98]), "+f"(d[99])
#define PTX_OUTS_104 PTX_OUTS_100, "+f"(d[100]), "+f"(d[101]), "+f"(d[102]), "+f"(d[103])
#define PTX_OUTS_108 PTX_OUTS_104, "+f"(d[104]), "+f"(d[105]), "+f"(d[106]), "+f"(d[107])
#define PTX_OUTS_112 PTX_OUTS_108, "+f"(d[108]), "+f"(d[109]), "+f"(d[110]), "+f"(d[111])
#define PTX_OUTS_116 PTX_OUTS_112, "+f"(d[112]), "+f"(d[113]), "+f"(d[114]), "+f"(d[115])
#define PTX_OUTS_120 PTX_OUTS_116, "+f"(d[116]), "+f"(d[117]), "+f"(d[118]), "+f"(d[119])
#define PTX_OUTS_124 PTX_OUTS_120, "+f"(d[120]), "+f"(d[121]), "+f"(d[122]), "+f"(d[123])
#define PTX_OUTS_128 PTX_OUTS_124, "+f"(d[124]), "+f"(d[125]), "+f"(d[126]), "+f"(d[127])

// PTX_WGMMA(N, N/2, then the numbers of the seven operands that follow the accumulators), for every N.
#define PTX_EVERY_WGMMA(PTX_WGMMA) \
    PTX_WGMMA(8, 4, 4, 5, 6, 7, 8, 9, 10) \
    PTX_WGMMA(16, 8, 8, 9, 10, 11, 12, 13, 14) \
    PTX_WGMMA(24, 12, 12, 13, 14, 15, 16, 17, 18) \
    PTX_WGMMA(32, 16, 16, 17, 18, 19, 20, 21, 22) \
    PTX_WGMMA(40, 20, 20, 21, 22, 23, 24, 25, 26) \
    PTX_WGMMA(48, 24, 24, 25, 26, 27, 28, 29, 30) \
    PTX_WGMMA(56, 28, 28, 29, 30, 31, 32, 33, 34) \
    PTX_WGMMA(64, 32, 32, 33, 34, 35, 36, 37, 38) \
    PTX_WGMMA(72, 36, 36, 37, 38, 39, 40, 41, 42) \
    PTX_WGMMA(80, 40, 40, 41, 42, 43, 44, 45, 46) \
    PTX_WGMMA(88, 44, 44, 45, 46, 47, 48, 49, 50) \
    PTX_WGMMA(96, 48, 48, 49, 50, 51, 52, 53, 54) \
    PTX_WGMMA(104, 52, 52, 53, 54, 55, 56, 57, 58) \
    PTX_WGMMA(112, 56, 56, 57, 58, 59, 60, 61, 62) \
    PTX_WGMMA(120, 60, 60, 61, 62, 63, 64, 65, 66) \
    PTX_WGMMA(128, 64, 64, 65, 66, 67, 68, 69, 70) \
    PTX_WGMMA(136, 68, 68, 69, 70, 71, 72, 73, 74) \
    PTX_WGMMA(144, 72, 72, 73, 74, 75, 76, 77, 78) \
    PTX_WGMMA(152, 76, 76, 77, 78, 79, 80, 81, 82) \
    PTX_WGMMA(160, 80, 80, 81, 82, 83, 84, 85, 86) \
    PTX_WGMMA(168, 84, 84, 85, 86, 87, 88, 89, 90) \
    PTX_WGMMA(176, 88, 88, 89, 90, 91, 92, 93, 94) \
    PTX_WGMMA(184, 92, 92, 93, 94, 95, 96, 97, 98) \
    PTX_WGMMA(192, 96, 96, 97, 98, 99, 100, 101, 102) \
    PTX_WGMMA(200, 100, 100, 101, 102, 103, 104, 105, 106) \
    PTX_WGMMA(208, 104, 104, 105, 106, 107, 108, 109, 110) \
    PTX_WGMMA(216, 108, 108, 109, 110, 111, 112, 113, 114) \
    PTX_WGMMA(224, 112, 112, 113, 114, 115, 116, 117, 118) \
    PTX_WGMMA(232, 116, 116, 117, 118, 119, 120, 121, 122) \
    PTX_WGMMA(240, 120, 120, 121, 122, 123, 124, 125, 126) \
    PTX_WGMMA(248, 124, 124, 125, 126, 127, 128, 129, 130) \
    PTX_WGMMA(256, 128, 128, 129, 130, 131, 132, 133, 134)
