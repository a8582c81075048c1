// fastproj._cpu: raw pointers, shapes and strides in; the Python adapter (backends/cpu.py) checks
// nothing that ops.py has not checked, and this file checks nothing at all.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <array>
#include <tuple>

#include "dispatch.hpp"

namespace py = pybind11;

namespace fastproj::cpu {
namespace {

using Address = std::uintptr_t;
using PieceTuple = std::tuple<Address, std::int64_t, std::int64_t, std::int64_t>;
using OutputTuple = std::tuple<Address, int, std::int64_t, std::int64_t>;
using KeyTuple = std::tuple<int, std::uint64_t, std::uint32_t>;

Piece to_piece(const PieceTuple& t) {
    return {reinterpret_cast<const void*>(std::get<0>(t)), std::get<1>(t), std::get<2>(t),
            std::get<3>(t)};
}
Output to_output(const OutputTuple& t) {
    return {reinterpret_cast<void*>(std::get<0>(t)), static_cast<DType>(std::get<1>(t)),
            std::get<2>(t), std::get<3>(t)};
}
MatrixKey to_key(const KeyTuple& t) {
    return {static_cast<Kind>(std::get<0>(t)), std::get<2>(t), std::get<1>(t)};
}

void bind_project(const std::vector<PieceTuple>& pieces, int dtype, std::int64_t batch,
                  std::int64_t row_offset, const KeyTuple& key, std::int64_t proj_dim, double scale,
                  bool accumulate, int precision, const OutputTuple& out, int isa,
                  int num_threads) {
    std::vector<Piece> list;
    list.reserve(pieces.size());
    for (const auto& piece : pieces) list.push_back(to_piece(piece));
    const py::gil_scoped_release release;
    project(list, static_cast<DType>(dtype), batch, row_offset, to_key(key), proj_dim, scale,
            accumulate, static_cast<Precision>(precision), to_output(out),
            {static_cast<Isa>(isa), num_threads});
}

void bind_project_transpose(const PieceTuple& y, int dtype, std::int64_t batch,
                            std::int64_t row_offset, std::int64_t rows, const KeyTuple& key,
                            double scale, const OutputTuple& out, int isa, int num_threads) {
    const py::gil_scoped_release release;
    project_transpose(to_piece(y), static_cast<DType>(dtype), batch, row_offset, rows, to_key(key),
                      scale, to_output(out), {static_cast<Isa>(isa), num_threads});
}

void bind_matrix(const KeyTuple& key, std::int64_t row_offset, std::int64_t rows,
                 std::int64_t col_offset, std::int64_t cols, const OutputTuple& out, int isa,
                 int num_threads) {
    const py::gil_scoped_release release;
    matrix(to_key(key), row_offset, rows, col_offset, cols, to_output(out),
           {static_cast<Isa>(isa), num_threads});
}

// name -> "" when usable here, else the reason; from the least set to the best.
py::dict isas() {
    py::dict result;
    for (int i = 0; i < kNumIsas; ++i) {
        result[isa_name(static_cast<Isa>(i))] = isa_unavailable(static_cast<Isa>(i));
    }
    return result;
}

}  // namespace
}  // namespace fastproj::cpu

PYBIND11_MODULE(_cpu, m) {
    using namespace fastproj::cpu;
    m.attr("SPEC_VERSION") = fastproj::kSpecVersion;
    m.def("isas", &isas);
    m.def("project", &bind_project);
    m.def("project_transpose", &bind_project_transpose);
    m.def("matrix", &bind_matrix);
    m.def("philox4x32_10",
          [](const std::array<std::uint32_t, 4>& c, const std::array<std::uint32_t, 2>& k) {
              const auto out = fastproj::philox4x32_10({{c[0], c[1], c[2], c[3]}}, k[0], k[1]);
              return std::array<std::uint32_t, 4>{out.w[0], out.w[1], out.w[2], out.w[3]};
          });
}
