// Coverage-guided fuzzing of the compiled decoders: `make fuzz` (clang's libFuzzer, with AddressSanitizer and
// UndefinedBehaviorSanitizer).
//
// The first 16 bytes of an input choose kind, options and sizes, as a receiver knows them, always in range;
// the rest is what a peer sent, repeated where a body needs more. Every field has memory of exactly its size.
// What a decoder refuses it must leave as it was.
#include <algorithm>
#include <cstdlib>
#include <memory>
#include <vector>

#include "cpu/chunk_topk.hpp"
#include "cpu/packing.hpp"
#include "cpu/quantize.hpp"
#include "cpu/random_k.hpp"
#include "cpu/sign.hpp"
#include "cpu/sparse.hpp"

namespace {

using namespace gck;

constexpr float kCanary = 5.0f;
constexpr int kThreads = 1;

int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// Where the next field starts.
int64_t aligned(int64_t nbytes) { return ceil_div(nbytes, 16) * 16; }

// One field of all ranks: the last rank's ends with the memory.
class Field {
 public:
  Field(int64_t ranks, int64_t stride, int64_t nbytes)
      : size_((ranks - 1) * stride + nbytes), memory_(new char[static_cast<size_t>(size_)]()) {}
  char* data() const { return memory_.get(); }
  int64_t size() const { return size_; }

 private:
  int64_t size_;
  std::unique_ptr<char[]> memory_;
};

class Input {
 public:
  Input(const uint8_t* data, size_t size) {
    std::copy_n(data, std::min<size_t>(size, sizeof options_), options_);
    if (size > sizeof options_) body_.assign(data + sizeof options_, data + size);
  }

  int64_t option(int i, int64_t low, int64_t high) const { return low + options_[i] % (high - low + 1); }
  int64_t numel() const { return 1 + (options_[4] | options_[5] << 8) % 3000; }
  uint64_t seed() const {
    uint64_t seed;
    std::memcpy(&seed, options_ + 8, sizeof seed);
    return seed;
  }

  // Fields that are filled one after the other take what follows.
  Field field(int64_t ranks, int64_t stride, int64_t nbytes) {
    Field made(ranks, stride, nbytes);
    for (int64_t i = 0; i < made.size() && !body_.empty(); ++i) {
      made.data()[i] = static_cast<char>(body_[next_]);
      next_ = next_ + 1 < body_.size() ? next_ + 1 : 0;
    }
    return made;
  }

 private:
  uint8_t options_[16] = {};
  std::vector<uint8_t> body_;
  size_t next_ = 0;
};

using Floats = std::unique_ptr<float[]>;

// How a reduction reads the residual: as it is, or faded and bounded.
ResidualOptions reading_of(const Input& input) {
  static constexpr float kClip = 0.5f;
  if (input.option(10, 0, 1) == 0) return {};
  return {0.5f, &kClip, nullptr};
}

Floats floats(int64_t count) {
  Floats made(new float[static_cast<size_t>(count)]);
  std::fill_n(made.get(), count, kCanary);
  return made;
}

void require(bool condition) {
  if (!condition) std::abort();
}

void require_untouched(const Floats& x, int64_t count) {
  for (int64_t i = 0; i < count; ++i) require(x[static_cast<size_t>(i)] == kCanary);
}

struct Common {
  int64_t numel, ranks;
  bool clear, add;
  float alpha;

  explicit Common(const Input& input)
      : numel(input.numel()),
        ranks(input.option(3, 1, 3)),
        clear(input.option(7, 0, 1)),
        add(input.option(7, 0, 3) > 1 || ranks > 1),
        alpha(input.option(7, 0, 7) > 3 ? 1.0f : 0.7f) {}
};

void sparse(Input& input) {
  const Common c(input);
  const auto dtype = static_cast<Dtype>(input.option(1, 0, 2));
  const bool wide = input.option(2, 0, 1);
  const int64_t count = std::min(input.option(6, 0, 255), c.numel);
  const int64_t values_size = count * (dtype == Dtype::fp32 ? 4 : 2), indices_size = count * (wide ? 8 : 4);
  const Floats out = floats(c.numel);
  SparseJob job{{}, count, dtype, wide, out.get(), c.numel, c.alpha, c.clear, c.add, kThreads};
  std::vector<Field> fields;
  for (int64_t rank = 0; rank < c.ranks; ++rank) {
    fields.push_back(input.field(1, 0, values_size));
    fields.push_back(input.field(1, 0, indices_size));
  }
  for (size_t i = 0; i < fields.size(); i += 2) job.rows.push_back({fields[i].data(), fields[i + 1].data()});
  const BadIndex bad = sparse_decompress(job);
  require(bad.row >= -1 && bad.row < c.ranks && bad.position >= -1 &&
          bad.position < std::max<int64_t>(count, 1));
  if (bad.row >= 0) require_untouched(out, c.numel);
}

void chunk_topk(Input& input, bool reduce) {
  const Common c(input);
  constexpr int all_bits[] = {32, 16, 8, 4, 2};
  const int bits = all_bits[input.option(1, 0, 4)];
  const int64_t size = int64_t{32} << input.option(2, 0, 8), k = std::min(input.option(6, 1, 255), size / 2);
  const int index_bits = size <= 4096 && input.option(7, 0, 15) > 7 ? 12 : 16;
  const int64_t chunks = ceil_div(c.numel, size), more = input.option(8, 0, 1);
  const int64_t values_size = (chunks + more) * packed_bytes(k, bits),
                scales_size = (chunks + more) * (bits > 8    ? 0
                                                 : bits == 2 ? 8
                                                             : 4),
                indices_size = (chunks + more) * packed_bytes(k, index_bits),
                stride = aligned(std::max({values_size, scales_size, indices_size}));
  const Field values = input.field(c.ranks, stride, values_size),
              scales = input.field(c.ranks, stride, scales_size),
              indices = input.field(c.ranks, stride, indices_size);
  const Floats out = floats(c.numel);
  ChunkTopkDecode job{values.data(),
                      scales.data(),
                      indices.data(),
                      c.ranks,
                      stride,
                      size,
                      k,
                      bits,
                      index_bits,
                      out.get(),
                      c.numel,
                      c.alpha,
                      c.clear,
                      c.add,
                      c.clear ? static_cast<float>(input.option(9, 1, 8)) : 1.0f};
  if (!reduce) {
    if (chunk_topk_decompress(job, kThreads) >= 0) require_untouched(out, c.numel);
    return;
  }
  job.out = nullptr, job.alpha = 1.0f, job.clear = job.add = true;
  const int64_t scales_at = aligned(chunks * packed_bytes(k, bits)),
                indices_at = aligned(scales_at + chunks * (bits > 8    ? 0
                                                           : bits == 2 ? 8
                                                                       : 4));
  const Field body(1, 0, indices_at + chunks * packed_bytes(k, index_bits));
  const Reduced done = chunk_topk_reduce(job,
                                         {nullptr, Dtype::fp32, out.get(), c.numel, size, k, bits, index_bits,
                                          body.data(), 0, chunks, scales_at, indices_at},
                                         3.0f, reading_of(input), kThreads);
  if (done.bad < 0) return;
  require_untouched(out, c.numel);
  require(std::all_of(body.data(), body.data() + body.size(), [](char x) { return x == 0; }));
}

void quantize(Input& input, bool reduce) {
  const Common c(input);
  constexpr int all_bits[] = {8, 4, 2, 2};
  const int64_t which = input.option(1, 0, 3);
  const int bits = all_bits[which];
  const bool two_levels = which == 3, stochastic = !two_levels && input.option(6, 0, 1);
  const int64_t size = int64_t{32} << input.option(2, 0, 8), chunks = ceil_div(c.numel, size);
  const int64_t codes_size = ceil_div(c.numel * bits, 8), scales_size = chunks * (two_levels ? 8 : 4),
                stride = aligned(std::max(codes_size, scales_size));
  const Field codes = input.field(c.ranks, stride, codes_size),
              scales = input.field(c.ranks, stride, scales_size);
  const Floats out = floats(c.numel);
  const DecodeInto into{out.get(), c.numel, c.alpha, c.clear, c.add, false};
  if (!reduce) {
    return quantize_decompress({codes.data(), scales.data(), c.ranks, stride, size, bits, two_levels, into},
                               kThreads);
  }
  const int64_t scales_at = aligned(codes_size);
  const Field body(1, 0, scales_at + scales_size);
  quantize_reduce({codes.data(), scales.data(), c.ranks, stride, size, bits, two_levels, {}},
                  {nullptr, Dtype::fp32, out.get(), c.numel, size, bits, two_levels, stochastic, input.seed(),
                   0, body.data(), 0, chunks, scales_at},
                  3.0f, reading_of(input), kThreads);
}

void sign(Input& input, bool reduce) {
  const Common c(input);
  const int64_t size = int64_t{32} << input.option(2, 0, 8), chunks = ceil_div(c.numel, size);
  const int64_t words_size = ceil_div(c.numel, 32) * 4, stride = aligned(std::max(words_size, chunks * 4));
  const Field words = input.field(c.ranks, stride, words_size),
              scales = input.field(c.ranks, stride, chunks * 4);
  const Floats out = floats(c.numel);
  const DecodeInto into{out.get(), c.numel, c.alpha, c.clear, c.add, false};
  if (!reduce) {
    return sign_decompress({words.data(), scales.data(), c.ranks, stride, size, into}, kThreads);
  }
  const int64_t scales_at = aligned(words_size);
  const Field body(1, 0, scales_at + chunks * 4);
  sign_reduce({words.data(), scales.data(), c.ranks, stride, size, {}},
              {nullptr, Dtype::fp32, out.get(), c.numel, size, body.data(), 0, chunks, scales_at}, 3.0f,
              reading_of(input), kThreads);
}

void random_k(Input& input) {
  const Common c(input);
  const auto dtype = static_cast<Dtype>(input.option(1, 0, 2));
  const int64_t k = std::min((input.option(2, 0, 255) << 4) + input.option(6, 1, 16), c.numel);
  const int64_t values_size = k * (dtype == Dtype::fp32 ? 4 : 2), stride = aligned(values_size);
  const Field values = input.field(c.ranks, stride, values_size);
  const Floats out = floats(c.numel);
  random_k_decompress({values.data(), c.ranks, stride, dtype, out.get(), c.alpha, c.clear, c.add},
                      {c.numel, k, input.seed()}, kThreads);
}

}  // namespace

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  Input input(data, size);
  switch (input.option(0, 0, 7)) {
    case 0:
      return sparse(input), 0;
    case 1:
    case 2:
      return chunk_topk(input, input.option(0, 0, 7) == 2), 0;
    case 3:
    case 4:
      return quantize(input, input.option(0, 0, 7) == 4), 0;
    case 5:
    case 6:
      return sign(input, input.option(0, 0, 7) == 6), 0;
    default:
      return random_k(input), 0;
  }
}
