#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <optional>
#include <tuple>
#include <vector>

#include "cpu/chunk_topk.hpp"
#include "cpu/copy.hpp"
#include "cpu/index_codecs.hpp"
#include "cpu/quantize.hpp"
#include "cpu/random_k.hpp"
#include "cpu/sign.hpp"
#include "cpu/sparse.hpp"
#include "cpu/topk.hpp"

namespace py = pybind11;

namespace {

using Address = uintptr_t;

template <typename T>
T* at(Address address) {
  return reinterpret_cast<T*>(address);
}

// (grad, grad_dtype, err, numel) of each tensor of a list, and (k, values, indices, wide_indices) of its
// payload.
using Runs = std::vector<std::tuple<Address, int, Address, int64_t>>;
using Place = std::tuple<int64_t, Address, Address, bool>;

// (decay, clip, statistics), the latter two 0 where there are none.
using Options = std::optional<std::tuple<float, Address, Address>>;

gck::ResidualOptions residual_of(const Options& options) {
  if (!options) return {};
  const auto [decay, clip, statistics] = *options;
  return {decay, at<float>(clip), at<double>(statistics)};
}

gck::TopkJob topk_job(Address grad, int grad_dtype, Address err, int64_t numel, int64_t k, Address values,
                      int value_dtype, Address indices, bool wide_indices, Address hint, int threads) {
  const gck::TopkRun run{at<void>(grad), gck::Dtype{grad_dtype}, at<float>(err), numel};
  return {{run},
          numel,
          k,
          at<void>(values),
          gck::Dtype{value_dtype},
          at<void>(indices),
          wide_indices,
          at<int32_t>(hint),
          threads};
}

// The payloads of several ranks: where the body of each begins.
using Bodies = std::vector<Address>;

std::vector<const char*> bodies_at(const Bodies& addresses) {
  std::vector<const char*> bodies;
  for (const Address address : addresses) bodies.push_back(at<char>(address));
  return bodies;
}

int64_t ranks_of(const Bodies& addresses) { return static_cast<int64_t>(addresses.size()); }

int64_t chunks_of(int64_t numel, int64_t chunk_size) { return (numel + chunk_size - 1) / chunk_size; }

}  // namespace

void bind_cpu(py::module_& m) {
  using namespace gck;
  const auto nogil = py::call_guard<py::gil_scoped_release>();

  m.def(
      "copy_large",
      [](Address to, Address from, int64_t nbytes, int threads) {
        copy_large(at<void>(to), at<void>(from), nbytes, threads);
      },
      nogil);
  m.def("isa", [] { return leaves().name; });

  m.def(
      "topk_compress",
      [](Address grad, int grad_dtype, Address err, int64_t numel, int64_t k, Address values, int value_dtype,
         Address indices, bool wide_indices, Address hint, int threads, const Options& options) {
        return topk_compress(topk_job(grad, grad_dtype, err, numel, k, values, value_dtype, indices,
                                      wide_indices, hint, threads),
                             residual_of(options));
      },
      nogil);

  m.def(
      "topk_preview",
      [](Address grad, int grad_dtype, Address err, int64_t numel, int64_t k, Address values, int value_dtype,
         Address indices, bool wide_indices, int threads) {
        return topk_preview(topk_job(grad, grad_dtype, err, numel, k, values, value_dtype, indices,
                                     wide_indices, 0, threads));
      },
      nogil);

  m.def(
      "topk_compress_flat",
      [](const Runs& runs, int64_t k, Address values, int value_dtype, Address indices, bool wide_indices,
         int threads, const Options& options) {
        TopkJob job{{},           0,       k,      at<void>(values), Dtype{value_dtype}, at<void>(indices),
                    wide_indices, nullptr, threads};
        for (const auto& [grad, grad_dtype, err, numel] : runs) {
          if (numel == 0) continue;
          job.runs.push_back({at<void>(grad), Dtype{grad_dtype}, at<float>(err), numel});
          job.numel += numel;
        }
        return topk_compress(std::move(job), residual_of(options));
      },
      nogil);

  m.def(
      "topk_compress_each",
      [](const Runs& runs, const std::vector<Place>& places, int value_dtype, int threads,
         const Options& options) {
        std::vector<TopkJob> jobs;
        for (size_t i = 0; i < runs.size(); ++i) {
          const auto [grad, grad_dtype, err, numel] = runs[i];
          const auto [k, values, indices, wide_indices] = places[i];
          if (numel == 0) continue;
          const TopkRun run{at<void>(grad), Dtype{grad_dtype}, at<float>(err), numel};
          jobs.push_back({{run},
                          numel,
                          k,
                          at<void>(values),
                          Dtype{value_dtype},
                          at<void>(indices),
                          wide_indices,
                          nullptr,
                          1});
        }
        return topk_compress_each(std::move(jobs), residual_of(options), threads);
      },
      nogil);

  m.def(
      "residual_measure",
      [](Address grad, int grad_dtype, Address err, int64_t numel, int threads, const Options& options) {
        residual_measure({at<void>(grad), Dtype{grad_dtype}, at<float>(err), numel}, residual_of(options),
                         threads);
      },
      nogil);

  m.def(
      "sparse_decompress",
      [](const Bodies& bodies, int64_t count, int value_dtype, int64_t indices_offset, bool wide_indices,
         Address out, int64_t numel, float alpha, bool clear, bool add, int threads, float divisor) {
        SparseJob job{
            {},      count,  Dtype{value_dtype}, wide_indices, at<float>(out), numel, alpha, clear, add,
            threads, divisor};
        for (const char* body : bodies_at(bodies)) job.rows.push_back({body, body + indices_offset});
        const BadIndex bad = sparse_decompress(job);
        return std::pair(bad.row, bad.position);
      },
      nogil);

  m.def(
      "chunk_topk_compress",
      [](Address grad, int grad_dtype, Address err, int64_t numel, int64_t chunk_size, int64_t k,
         int value_bits, int index_bits, Address bodies, int64_t row_stride, int64_t chunks_per_row,
         int64_t scales_offset, int64_t indices_offset, int threads, const Options& options) {
        return chunk_topk_compress(
            {at<void>(grad), Dtype{grad_dtype}, at<float>(err), numel, chunk_size, k, value_bits, index_bits,
             at<char>(bodies), row_stride, chunks_per_row, scales_offset, indices_offset},
            residual_of(options), threads);
      },
      nogil);

  m.def(
      "chunk_topk_decompress",
      [](const Bodies& bodies, int64_t scales_offset, int64_t indices_offset, int64_t chunk_size, int64_t k,
         int value_bits, int index_bits, Address out, int64_t numel, float alpha, bool clear, bool add,
         float divisor, int threads) {
        return chunk_topk_decompress(
            {bodies_at(bodies).data(), ranks_of(bodies), scales_offset, indices_offset, chunk_size, k,
             value_bits, index_bits, at<float>(out), numel, alpha, clear, add, divisor},
            threads);
      },
      nogil);

  m.def(
      "chunk_topk_reduce",
      [](const Bodies& bodies, int64_t scales_offset, int64_t indices_offset, int64_t chunk_size, int64_t k,
         int value_bits, int index_bits, float divisor, Address err, int64_t numel, int64_t server_k,
         int server_value_bits, int server_index_bits, Address body, int64_t server_scales_offset,
         int64_t server_indices_offset, int threads, const Options& options) {
        const Reduced done =
            chunk_topk_reduce({bodies_at(bodies).data(), ranks_of(bodies), scales_offset, indices_offset,
                               chunk_size, k, value_bits, index_bits, nullptr, numel, 1.0f, true, true, 1.0f},
                              {nullptr, Dtype::fp32, at<float>(err), numel, chunk_size, server_k,
                               server_value_bits, server_index_bits, at<char>(body), 0,
                               chunks_of(numel, chunk_size), server_scales_offset, server_indices_offset},
                              divisor, residual_of(options), threads);
        return std::pair(done.bad, done.cleared);
      },
      nogil);

  m.def(
      "quantize_compress",
      [](Address grad, int grad_dtype, Address err, int64_t numel, int64_t chunk_size, int bits,
         bool two_levels, bool stochastic, int64_t seed, int64_t first, Address bodies, int64_t row_stride,
         int64_t chunks_per_row, int64_t scales_offset, int threads, const Options& options) {
        return quantize_compress({at<void>(grad), Dtype{grad_dtype}, at<float>(err), numel, chunk_size, bits,
                                  two_levels, stochastic, static_cast<uint64_t>(seed), first,
                                  at<char>(bodies), row_stride, chunks_per_row, scales_offset},
                                 residual_of(options), threads);
      },
      nogil);

  m.def(
      "quantize_decompress",
      [](const Bodies& bodies, int64_t scales_offset, int64_t chunk_size, int bits, bool two_levels,
         Address out, int64_t numel, float alpha, bool clear, bool add, int threads) {
        quantize_decompress({bodies_at(bodies).data(),
                             ranks_of(bodies),
                             scales_offset,
                             chunk_size,
                             bits,
                             two_levels,
                             {at<float>(out), numel, alpha, clear, add, false}},
                            threads);
      },
      nogil);

  m.def(
      "quantize_reduce",
      [](const Bodies& bodies, int64_t scales_offset, int64_t chunk_size, int bits, bool two_levels,
         float divisor, Address err, int64_t numel, int server_bits, bool server_two_levels, bool stochastic,
         int64_t seed, int64_t first, Address body, int64_t server_scales_offset, int threads,
         const Options& options) {
        return quantize_reduce(
            {bodies_at(bodies).data(), ranks_of(bodies), scales_offset, chunk_size, bits, two_levels, {}},
            {nullptr, Dtype::fp32, at<float>(err), numel, chunk_size, server_bits, server_two_levels,
             stochastic, static_cast<uint64_t>(seed), first, at<char>(body), 0, chunks_of(numel, chunk_size),
             server_scales_offset},
            divisor, residual_of(options), threads);
      },
      nogil);

  m.def(
      "random_k_compress",
      [](Address grad, int grad_dtype, Address err, int64_t numel, int64_t k, int64_t seed, float factor,
         Address values, int value_dtype, int threads, const Options& options) {
        return random_k_compress(
            {at<void>(grad), Dtype{grad_dtype}, at<float>(err), factor, at<void>(values), Dtype{value_dtype}},
            {numel, k, static_cast<uint64_t>(seed)}, residual_of(options), threads);
      },
      nogil);

  m.def(
      "random_k_decompress",
      [](const Bodies& bodies, int64_t k, int value_dtype, int64_t seed, Address out, int64_t numel,
         float alpha, bool clear, bool add, int threads) {
        random_k_decompress({bodies_at(bodies).data(), ranks_of(bodies), Dtype{value_dtype}, at<float>(out),
                             alpha, clear, add},
                            {numel, k, static_cast<uint64_t>(seed)}, threads);
      },
      nogil);

  m.def(
      "random_k_indices",
      [](int64_t seed, int64_t numel, int64_t k, int64_t first, int64_t count, Address out) {
        random_k_indices({numel, k, static_cast<uint64_t>(seed)}, first, first + count, at<int64_t>(out));
      },
      nogil);

  m.def(
      "sign_compress",
      [](Address grad, int grad_dtype, Address err, int64_t numel, int64_t chunk_size, Address bodies,
         int64_t row_stride, int64_t chunks_per_row, int64_t scales_offset, int threads,
         const Options& options) {
        return sign_compress({at<void>(grad), Dtype{grad_dtype}, at<float>(err), numel, chunk_size,
                              at<char>(bodies), row_stride, chunks_per_row, scales_offset},
                             residual_of(options), threads);
      },
      nogil);

  m.def(
      "sign_decompress",
      [](const Bodies& bodies, int64_t scales_offset, int64_t chunk_size, Address out, int64_t numel,
         float alpha, bool clear, bool add, int threads) {
        sign_decompress({bodies_at(bodies).data(),
                         ranks_of(bodies),
                         scales_offset,
                         chunk_size,
                         {at<float>(out), numel, alpha, clear, add, false}},
                        threads);
      },
      nogil);

  m.def(
      "sign_reduce",
      [](const Bodies& bodies, int64_t scales_offset, int64_t chunk_size, float divisor, Address err,
         int64_t numel, Address body, int64_t server_scales_offset, int threads, const Options& options) {
        return sign_reduce({bodies_at(bodies).data(), ranks_of(bodies), scales_offset, chunk_size, {}},
                           {nullptr, Dtype::fp32, at<float>(err), numel, chunk_size, at<char>(body), 0,
                            chunks_of(numel, chunk_size), server_scales_offset},
                           divisor, residual_of(options), threads);
      },
      nogil);

  const auto elias_fano = [](Address indices, bool wide, int64_t count, int64_t numel, int low_bits,
                             Address low, int64_t low_bytes, Address high, int64_t high_bits) {
    return EliasFano{numel,         count,          low_bits,  wide,      at<void>(indices),
                     at<char>(low), at<char>(high), low_bytes, high_bits, (high_bits + 63) / 64};
  };

  m.def(
      "elias_fano_encode",
      [elias_fano](Address indices, bool wide, int64_t count, int64_t numel, int low_bits, Address low,
                   int64_t low_bytes, Address high, int64_t high_bits, int threads) {
        return static_cast<int>(elias_fano_encode(
            elias_fano(indices, wide, count, numel, low_bits, low, low_bytes, high, high_bits), threads));
      },
      nogil);

  m.def(
      "elias_fano_decode",
      [elias_fano](Address indices, bool wide, int64_t count, int64_t numel, int low_bits, Address low,
                   int64_t low_bytes, Address high, int64_t high_bits, int threads) {
        return static_cast<int>(elias_fano_decode(
            elias_fano(indices, wide, count, numel, low_bits, low, low_bytes, high, high_bits), threads));
      },
      nogil);

  m.def(
      "block16_encode",
      [](Address indices, bool wide, int64_t count, int64_t numel, Address locals, Address ends,
         int threads) {
        return static_cast<int>(block16_encode(
            {numel, count, wide, at<void>(indices), at<void>(ends), at<uint16_t>(locals)}, threads));
      },
      nogil);

  m.def(
      "block16_decode",
      [](Address indices, bool wide, int64_t count, int64_t numel, Address locals, Address ends,
         int threads) {
        return static_cast<int>(block16_decode(
            {numel, count, wide, at<void>(indices), at<void>(ends), at<uint16_t>(locals)}, threads));
      },
      nogil);
}
