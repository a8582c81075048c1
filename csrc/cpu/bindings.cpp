// fastproj._cpu. fastproj/checks.py has checked all arguments. Neither the Python adapter
// (backends/cpu.py) nor this file checks them again.
#include "../bindings.hpp"

#include <array>

#include "machine.hpp"
#include "operations.hpp"

namespace py = pybind11;

namespace {

using namespace fastproj::cpu;

// name -> "" when usable here, else the reason; from the least set to the best.
py::dict isas() {
    py::dict result;
    for (int i = 0; i < kNumIsas; ++i) {
        result[isa_name(static_cast<Isa>(i))] = isa_unavailable(static_cast<Isa>(i));
    }
    return result;
}

}  // namespace

PYBIND11_MODULE(_cpu, m) {
    using fastproj::Call, fastproj::View;
    const py::call_guard<py::gil_scoped_release> unlocked;
    m.attr("SPEC_VERSION") = fastproj::kSpecVersion;
    m.def("isas", &isas);
    m.def(
        "project",
        [](const std::vector<View>& pieces, const View& out, const Call& call, int isa,
           int num_threads) { project(pieces, out, call, {static_cast<Isa>(isa), num_threads}); },
        unlocked);
    m.def(
        "project_transpose",
        [](const View& y, const View& out, const Call& call, int isa, int num_threads) {
            project_transpose(y, out, call, {static_cast<Isa>(isa), num_threads});
        },
        unlocked);
    m.def(
        "matrix",
        [](const View& out, const Call& call, std::int64_t col_offset, int isa, int num_threads) {
            matrix(out, call, col_offset, {static_cast<Isa>(isa), num_threads});
        },
        unlocked);
    m.def("philox4x32_10",
          [](const std::array<std::uint32_t, 4>& c, const std::array<std::uint32_t, 2>& k) {
              const auto out = fastproj::philox4x32_10({{c[0], c[1], c[2], c[3]}}, k[0], k[1]);
              return std::array<std::uint32_t, 4>{out.w[0], out.w[1], out.w[2], out.w[3]};
          });
}
