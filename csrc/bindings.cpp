// The Python module genft_cuda: the launchers of genft.h with pointers and streams as integers, lists of matrices as
// lists of integers. Arguments are checked in genft_kernels/backends/cuda/kernels.py.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <cstdint>
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
    using Python = const std::vector<std::uintptr_t>&;
    static const void* const* get(Python addresses) { return reinterpret_cast<const void* const*>(addresses.data()); }
};

template <class... Arguments>
auto from_integers(int (*launcher)(Arguments...)) {
    return [launcher](typename Argument<Arguments>::Python... arguments) {
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
}
