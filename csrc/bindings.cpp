// The Python module genft_cuda: the launchers of genft.h with pointers and streams as integers, structures and lists of
// matrices as tuples. Arguments are checked in genft_kernels/backends/plan.py.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <cstdint>
#include <tuple>
#include <vector>

#include "genft.h"

namespace {

// How an argument comes from Python, and what the launcher gets.
template <class T>
struct Argument {
    using Python = T;
    static T get(T value) { return value; }
};
template <class T>
struct Argument<T*> {
    using Python = std::uintptr_t;
    static T* get(std::uintptr_t address) { return reinterpret_cast<T*>(address); }
};
template <>
struct Argument<const void* const*> {
    using Python = std::vector<std::uintptr_t>;
    static const void* const* get(const Python& list) { return reinterpret_cast<const void* const*>(list.data()); }
};

// A structure comes as a tuple of its fields.
template <class T, class... Fields>
struct Structure {
    using Python = std::tuple<typename Argument<Fields>::Python...>;
    static T get(const Python& tuple) {
        return std::apply([](const auto&... field) { return T{Argument<Fields>::get(field)...}; }, tuple);
    }
};
template <class T>
struct Argument<const T&> : Argument<T> {};
template <>
struct Argument<genft::BigMatrix> : Structure<genft::BigMatrix, const void*, std::int64_t, bool> {};
template <>
struct Argument<genft::BigMatrices>
    : Structure<genft::BigMatrices, const void* const*, std::int64_t, bool, int, int, int> {};
template <>
struct Argument<genft::Update> : Structure<genft::Update, const void*, const void*, const std::int64_t*, int, int, int,
                                           int, std::uint32_t, float, std::uint32_t, int> {};
template <>
struct Argument<genft::Outcome> : Structure<genft::Outcome, void*, const void*, int, void*> {};
template <>
struct Argument<genft::Tokens>
    : Structure<genft::Tokens, const void*, std::int64_t, const void*, std::int64_t, int, int> {};
template <>
struct Argument<genft::Sum> : Structure<genft::Sum, const float*, int, std::int64_t, genft::Outcome> {};

template <class... Arguments>
auto from_integers(int (*launcher)(Arguments...)) {
    return [launcher](const typename Argument<Arguments>::Python&... arguments) {
        return launcher(Argument<Arguments>::get(arguments)...);
    };
}

}  // namespace

PYBIND11_MODULE(genft_cuda, m) {
    m.doc() = "CUDA kernels of genft_kernels; see csrc/genft.h.";
    m.def("error_string", &genft::error_string);
    m.def("thin_product", from_integers(&genft::thin_product));
    m.def("thin_transposed", from_integers(&genft::thin_transposed));
    m.def("row_forward", from_integers(&genft::row_forward));
    m.def("row_backward_out", from_integers(&genft::row_backward_out));
    m.def("row_backward_in", from_integers(&genft::row_backward_in));
    m.def("fold", from_integers(&genft::fold));
    m.def("contract", from_integers(&genft::contract));
    m.def("sum_parts", from_integers(&genft::sum_parts));
}
