// How both modules read what fastproj/call.py makes. A View comes as a tuple in the order of its
// fields. A Call, its MatrixKey included, comes as a dict by the names of its fields.
#pragma once

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <tuple>

#include "call.hpp"

namespace fastproj {

// A field's name, kept by Python: looking up fresh strings would cost a small call 0.5 us.
class Field {
  public:
    explicit Field(const char* name) : name_(PyUnicode_InternFromString(name)) {}
    template <class T>
    T of(const pybind11::dict& fields) const {
        return pybind11::cast<T>(fields[name_]);  // KeyError where it is missing
    }

  private:
    pybind11::handle name_;
};

inline Call call_from(const pybind11::dict& fields) {
    static const Field kind("kind"), seed("seed"), stream("stream"), row_offset("row_offset"),
        scale("scale"), accumulate("accumulate"), terms("terms"), block_log2("block_log2");
    const MatrixKey key{static_cast<Kind>(kind.of<int>(fields)), stream.of<std::uint32_t>(fields),
                        seed.of<std::uint64_t>(fields), block_log2.of<std::uint32_t>(fields)};
    return {key, row_offset.of<std::int64_t>(fields), scale.of<double>(fields),
            accumulate.of<bool>(fields), terms.of<int>(fields)};
}

inline View view_from(const pybind11::tuple& fields) {
    const auto [data, dtype, size0, size1, stride0, stride1] = pybind11::cast<
        std::tuple<std::uintptr_t, int, std::int64_t, std::int64_t, std::int64_t, std::int64_t>>(
        fields);
    return {reinterpret_cast<void*>(data),
            static_cast<Dtype>(dtype),
            {size0, size1},
            {stride0, stride1}};
}

}  // namespace fastproj

namespace pybind11::detail {

// So that bound functions take the structs themselves.
template <class T, class Fields, T (*from)(const Fields&)>
struct FieldsCaster {
    PYBIND11_TYPE_CASTER(T, handle_type_name<Fields>::name);
    bool load(handle source, bool) {
        if (!isinstance<Fields>(source)) return false;
        value = from(reinterpret_borrow<Fields>(source));
        return true;
    }
};

template <>
struct type_caster<fastproj::View> : FieldsCaster<fastproj::View, tuple, fastproj::view_from> {};
template <>
struct type_caster<fastproj::Call> : FieldsCaster<fastproj::Call, dict, fastproj::call_from> {};

}  // namespace pybind11::detail
