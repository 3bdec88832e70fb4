// Calls that take tensors as they are, and make those of the payload: of few elements, what Python does about
// a kernel takes longer than the kernel.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <tuple>

#include "cpu/chunk_topk.hpp"
#include "cpu/quantize.hpp"
#include "cpu/random_k.hpp"
#include "cpu/sign.hpp"
#include "cpu/sparse.hpp"
#include "cpu/topk.hpp"
#include "direct.hpp"
#include "maker.hpp"

namespace py = pybind11;

namespace gck {
namespace {

BodyField field_of(int code, int bits, int64_t offset, const std::vector<int64_t>& shape) {
  BodyField field{{static_cast<uint8_t>(code), static_cast<uint8_t>(bits), 1},
                  shape[0],
                  offset,
                  static_cast<int>(shape.size()),
                  {shape[0]}};
  if (field.ndim == 2) field.count *= field.shape[1] = shape[1];
  return field;
}

// alpha * decoded of each payload in turn, written to `out`, or added to what is there, or where `clear` to
// zeros. One alpha, or as many as payloads. False where payloads or out are for others to look at, and
// nothing was written.
bool decompress(const Direct& direct, const py::list& payloads, py::handle out,
                const std::vector<float>& alphas, bool clear, bool add, int64_t seed, int threads) {
  const auto outputs = outputs_of(payloads, direct.layout, out, direct.numel);
  if (!outputs) return false;
  const Alphas alpha = alphas.size() == 1 ? Alphas(alphas[0]) : Alphas(alphas.data());
  const py::gil_scoped_release nogil;
  return direct.decompress(outputs->received, {outputs->out, direct.numel, alpha, clear, add, false}, seed,
                           threads);
}

Direct topk(int64_t numel, const BodyLayout& layout, int value_dtype) {
  const int64_t k = layout.fields[0].count, indices = layout.fields[1].offset;
  const bool wide = layout.fields[1].dtype.bits == 64;
  const Dtype dtype{value_dtype};
  return {numel, layout,
          [=](const Inputs& in, char* body, int64_t, int threads) {
            topk_compress({{{in.grad, in.dtype, in.err, numel}},
                           numel,
                           k,
                           body,
                           dtype,
                           body + indices,
                           wide,
                           nullptr,
                           threads});
          },
          [=](const Received& from, const DecodeInto& into, int64_t, int threads) {
            std::vector<SparseRow> rows;
            for (const char* values : from.bodies) rows.push_back({values, values + from.offsets[1]});
            return sparse_decompress({std::move(rows), k, dtype, wide, into.out, numel, into.alpha,
                                      into.clear, into.add, threads})
                       .row < 0;
          }};
}

Direct sign(int64_t numel, const BodyLayout& layout, int64_t chunk_size) {
  const int64_t chunks = layout.fields[1].count, scales = layout.fields[1].offset;
  return {numel, layout,
          [=](const Inputs& in, char* body, int64_t, int threads) {
            sign_compress({in.grad, in.dtype, in.err, numel, chunk_size, body, 0, chunks, scales}, {},
                          threads);
          },
          [=](const Received& from, const DecodeInto& into, int64_t, int threads) {
            sign_decompress({from.bodies.data(), from.ranks(), from.offsets[1], chunk_size, into}, threads);
            return true;
          }};
}

Direct quantize(int64_t numel, const BodyLayout& layout, int64_t chunk_size, int bits, bool two_levels,
                bool stochastic) {
  const int64_t chunks = layout.fields[1].shape[0], scales = layout.fields[1].offset;
  return {numel, layout,
          [=](const Inputs& in, char* body, int64_t seed, int threads) {
            quantize_compress({in.grad, in.dtype, in.err, numel, chunk_size, bits, two_levels, stochastic,
                               static_cast<uint64_t>(seed), 0, body, 0, chunks, scales},
                              {}, threads);
          },
          [=](const Received& from, const DecodeInto& into, int64_t, int threads) {
            quantize_decompress(
                {from.bodies.data(), from.ranks(), from.offsets[1], chunk_size, bits, two_levels, into},
                threads);
            return true;
          }};
}

Direct chunk_topk(int64_t numel, const BodyLayout& layout, int64_t chunk_size, int64_t k, int value_bits,
                  int index_bits) {
  const int64_t chunks = layout.fields[0].shape[0], scales = layout.fields[1].offset,
                indices = layout.fields[2].offset;
  return {numel, layout,
          [=](const Inputs& in, char* body, int64_t, int threads) {
            chunk_topk_compress({in.grad, in.dtype, in.err, numel, chunk_size, k, value_bits, index_bits,
                                 body, 0, chunks, scales, indices},
                                {}, threads);
          },
          [=](const Received& from, const DecodeInto& into, int64_t, int threads) {
            return chunk_topk_decompress(
                       {from.bodies.data(), from.ranks(), from.offsets[1], from.offsets[2], chunk_size, k,
                        value_bits, index_bits, into.out, numel, into.alpha, into.clear, into.add, 1.0f},
                       threads) < 0;
          }};
}

Direct random_k(int64_t numel, const BodyLayout& layout, int value_dtype) {
  const int64_t k = layout.fields[0].count;
  const Dtype dtype{value_dtype};
  return {numel, layout,
          [=](const Inputs& in, char* body, int64_t seed, int threads) {
            random_k_compress({in.grad, in.dtype, in.err, 1.0f, body, dtype},
                              {numel, k, static_cast<uint64_t>(seed)}, {}, threads);
          },
          [=](const Received& from, const DecodeInto& into, int64_t seed, int threads) {
            random_k_decompress(
                {from.bodies.data(), from.ranks(), dtype, into.out, into.alpha, into.clear, into.add},
                {numel, k, static_cast<uint64_t>(seed)}, threads);
            return true;
          }};
}

}  // namespace
}  // namespace gck

void bind_direct(py::module_& m) {
  using namespace gck;

  m.def("find_tensors", &find_tensors);
  m.def("drop_results", &drop_results);
  m.def("new_tensor", [](int code, int bits, int64_t numel) -> py::object {
    const BodyLayout layout{{field_of(code, bits, 0, {numel})}, numel * bits / 8};
    return NewBody(layout).tensors()[0];
  });

  py::class_<BodyLayout>(m, "BodyLayout")
      .def(py::init(
          [](const std::vector<std::tuple<int, int, int64_t, std::vector<int64_t>>>& fields, int64_t nbytes) {
            if (fields.empty() || fields.size() > kMostFields) throw py::value_error("fields: 1 to 3");
            BodyLayout layout{{}, nbytes};
            for (const auto& [code, bits, offset, shape] : fields) {
              if (shape.empty() || shape.size() > 2) throw py::value_error("dimensions of a field: 1 or 2");
              layout.fields.push_back(field_of(code, bits, offset, shape));
            }
            return layout;
          }));

  py::class_<Direct>(m, "Direct").def("decompress", &decompress);
  m.def("payload_maker", &payload_maker);
  m.def("direct_topk", &topk);
  m.def("direct_sign", &sign);
  m.def("direct_quantize", &quantize);
  m.def("direct_chunk_topk", &chunk_topk);
  m.def("direct_random_k", &random_k);
}
