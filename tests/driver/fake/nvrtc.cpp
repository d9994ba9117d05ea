// A run-time compiler for machines without one: the host's compiler and the emulator behind NVRTC's interface.
//
// The "cubin" is a shared object. FAKE_KERNELS names kernels-cu (for the emulator), FAKE_RUNTIME an object file of the
// emulator's runtime, FAKE_CXX the compiler, FAKE_LOG a file that gets a line a compilation. FAKE_NVRTC sets the
// version (12040 where not set).
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <fstream>
#include <iterator>
#include <string>
#include <unistd.h>
#include <vector>

namespace {

enum Result { kSuccess = 0, kInvalidInput = 3, kInvalidProgram = 4, kInvalidOption = 5, kCompilation = 6 };

struct Program {
    std::string text, name, log;
    std::vector<char> cubin;
};

std::string variable(const char* name, const char* otherwise = "") {
    const char* value = getenv(name);
    return value ? value : otherwise;
}

std::vector<char> read(const std::string& path) {
    std::ifstream in(path, std::ios::binary);
    return {std::istreambuf_iterator<char>(in), std::istreambuf_iterator<char>()};
}

}  // namespace

extern "C" {

int nvrtcVersion(int* major, int* minor) {
    int version = atoi(variable("FAKE_NVRTC", "12040").c_str());
    *major = version / 1000, *minor = version % 1000 / 10;
    return kSuccess;
}

const char* nvrtcGetErrorString(int result) {
    switch (result) {
        case kSuccess: return "NVRTC_SUCCESS";
        case kInvalidInput: return "NVRTC_ERROR_INVALID_INPUT";
        case kInvalidProgram: return "NVRTC_ERROR_INVALID_PROGRAM";
        case kInvalidOption: return "NVRTC_ERROR_INVALID_OPTION";
        case kCompilation: return "NVRTC_ERROR_COMPILATION";
    }
    return "NVRTC_ERROR unknown";
}

int nvrtcCreateProgram(Program** program, const char* text, const char* name, int headers, const char* const*,
                       const char* const*) {
    if (!program || !text || headers) return kInvalidInput;
    *program = new Program{text, name ? name : "default_program", "", {}};
    return kSuccess;
}

int nvrtcDestroyProgram(Program** program) {
    if (!program || !*program) return kInvalidProgram;
    delete *program;
    *program = nullptr;
    return kSuccess;
}

int nvrtcCompileProgram(Program* p, int count, const char* const* options) {
    if (!p) return kInvalidProgram;
    std::string flags, target;
    for (int i = 0; i < count; i++) {
        std::string option = options[i];
        if (option.rfind("--gpu-architecture=", 0) == 0)
            target = option.substr(19);
        else if (option.rfind("-D", 0) == 0 || option == "-std=c++20")
            flags += " " + option;
        else if (option == "-default-device")
            continue;
        else
            return p->log = "unrecognized option " + option, kInvalidOption;
    }
    if (target.rfind("sm_", 0)) return p->log = "no architecture", kInvalidOption;
    // In the folder of the row, where the process runs.
    char folder[] = "./fake-nvrtc-XXXXXX";
    if (!mkdtemp(folder)) return kInvalidInput;
    std::string here = folder, source = here + "/source.cu", object = here + "/kernels.so", log = here + "/log";
    std::ofstream(source) << p->text;
    // The text asks for ../emu/language.h beside the folder of the source.
    std::string command = variable("FAKE_CXX", "g++") + " -std=c++20 -O1 -fPIC -shared -pthread -w -fno-gnu-unique " +
                          variable("FAKE_FLAGS") +
                          flags + " -I" + variable("FAKE_KERNELS") + "/common -x c++ " + source + " -x none " +
                          variable("FAKE_RUNTIME") + " -Wl,-Bsymbolic -o " + object + " 2> " + log;
    int status = system(command.c_str());
    std::vector<char> said = read(log);
    p->log.assign(said.begin(), said.end());
    p->cubin = read(object);
    system(("rm -r " + here).c_str());
    std::ofstream(variable("FAKE_LOG", "/dev/null"), std::ios::app) << "compile " << p->name << " " << target << "\n";
    return status == 0 && !p->cubin.empty() ? kSuccess : kCompilation;
}

int nvrtcGetProgramLogSize(Program* p, size_t* size) { return *size = p->log.size() + 1, kSuccess; }
int nvrtcGetProgramLog(Program* p, char* log) { return memcpy(log, p->log.c_str(), p->log.size() + 1), kSuccess; }
int nvrtcGetCUBINSize(Program* p, size_t* size) { return *size = p->cubin.size(), kSuccess; }
int nvrtcGetCUBIN(Program* p, char* cubin) { return memcpy(cubin, p->cubin.data(), p->cubin.size()), kSuccess; }
}
