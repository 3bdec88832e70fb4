#include <pybind11/pybind11.h>

#include "cpu/chunk_topk.hpp"
#include "cpu/sign.hpp"
#include "cpu/topk.hpp"

namespace py = pybind11;

namespace {

using Address = uintptr_t;

template <typename T>
T* at(Address address) {
  return reinterpret_cast<T*>(address);
}

}  // namespace

void bind_cpu(py::module_& m) {
  using namespace gck;
  const auto nogil = py::call_guard<py::gil_scoped_release>();

  m.def("isa", [] { return leaves().name; });

  m.def(
      "topk_compress",
      [](Address grad, int grad_dtype, Address err, int64_t numel, int64_t k, Address values, int value_dtype,
         Address indices, bool wide_indices, int threads) {
        return topk_compress({at<void>(grad), Dtype{grad_dtype}, at<float>(err), numel, k, at<void>(values),
                              Dtype{value_dtype}, at<void>(indices), wide_indices, threads});
      },
      nogil);

  m.def(
      "topk_decompress",
      [](Address values, int value_dtype, Address indices, bool wide_indices, int64_t k, Address out,
         int64_t numel, float alpha, bool accumulate, int threads) {
        return topk_decompress({at<void>(values), Dtype{value_dtype}, at<void>(indices), wide_indices, k,
                                at<float>(out), numel, alpha, accumulate, threads});
      },
      nogil);

  m.def(
      "chunk_topk_compress",
      [](Address grad, int grad_dtype, Address err, int64_t numel, int64_t chunk_size, int64_t k,
         int value_bits, int index_bits, Address bodies, int64_t row_stride, int64_t chunks_per_row,
         int64_t scales_offset, int64_t indices_offset, int threads) {
        return chunk_topk_compress(
            {at<void>(grad), Dtype{grad_dtype}, at<float>(err), numel, chunk_size, k, value_bits, index_bits,
             at<char>(bodies), row_stride, chunks_per_row, scales_offset, indices_offset},
            threads);
      },
      nogil);

  m.def(
      "chunk_topk_decompress",
      [](Address values, Address scales, Address indices, int64_t ranks, int64_t rank_stride,
         int64_t chunk_size, int64_t k, int value_bits, int index_bits, Address out, int64_t numel,
         float alpha, bool clear, bool add, int threads) {
        return chunk_topk_decompress(
            {at<char>(values), at<char>(scales), at<char>(indices), ranks, rank_stride, chunk_size, k,
             value_bits, index_bits, at<float>(out), numel, alpha, clear, add},
            threads);
      },
      nogil);

  m.def(
      "sign_compress",
      [](Address grad, int grad_dtype, Address err, int64_t numel, int64_t chunk_size, Address bodies,
         int64_t row_stride, int64_t chunks_per_row, int64_t scales_offset, int threads) {
        return sign_compress({at<void>(grad), Dtype{grad_dtype}, at<float>(err), numel, chunk_size,
                              at<char>(bodies), row_stride, chunks_per_row, scales_offset},
                             threads);
      },
      nogil);

  m.def(
      "sign_decompress",
      [](Address words, Address scales, Address out, int64_t numel, int64_t chunk_size, float alpha,
         bool accumulate, int threads) {
        sign_decompress(
            {at<uint32_t>(words), at<float>(scales), at<float>(out), numel, chunk_size, alpha, accumulate},
            threads);
      },
      nogil);
}
