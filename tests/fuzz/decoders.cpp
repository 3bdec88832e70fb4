// Coverage-guided fuzzing of the compiled decoders: `make fuzz` (clang's libFuzzer, with AddressSanitizer and
// UndefinedBehaviorSanitizer).
//
// The first 16 bytes of an input choose kind, options and sizes, as a receiver knows them, always in range;
// the rest is what a peer sent, repeated where a body needs more. Every rank's body has memory of its own,
// and what is between its fields must not be touched. What a decoder refuses it must leave as it was.
#include <sanitizer/asan_interface.h>

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

// A body: its fields, and between them what must not be touched.
class Body {
 public:
  explicit Body(const std::vector<int64_t>& sizes) : sizes_(sizes), memory_(new char[size()]()) {
    for (size_t i = 0; i < sizes_.size(); ++i) {
      const char* end = field(i) + sizes_[i];
      ASAN_POISON_MEMORY_REGION(end, static_cast<size_t>(data() + offset(i + 1) - end));
    }
  }
  Body(Body&&) = default;
  ~Body() {
    if (memory_) ASAN_UNPOISON_MEMORY_REGION(data(), size());
  }

  char* data() const { return memory_.get(); }
  char* field(size_t i) const { return data() + offset(i); }
  int64_t offset(size_t field) const {
    int64_t offset = 0;
    for (size_t i = 0; i < field; ++i) offset = aligned(offset + sizes_[i] + 1);
    return offset;
  }
  const std::vector<int64_t>& sizes() const { return sizes_; }

 private:
  size_t size() const { return static_cast<size_t>(offset(sizes_.size())); }

  std::vector<int64_t> sizes_;
  std::unique_ptr<char[]> memory_;
};

// Those of all ranks, which lie anywhere.
class Bodies {
 public:
  void add(Body body) {
    at_.push_back(body.data());
    bodies_.push_back(std::move(body));
  }
  const char* const* at() const { return at_.data(); }
  int64_t offset(size_t field) const { return bodies_[0].offset(field); }
  const Body& operator[](size_t rank) const { return bodies_[rank]; }

 private:
  std::vector<Body> bodies_;
  std::vector<const char*> at_;
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

  // Fields of the same sizes for each rank, filled one after the other.
  Bodies bodies(int64_t ranks, const std::vector<int64_t>& sizes) {
    Bodies made;
    for (int64_t rank = 0; rank < ranks; ++rank) {
      Body body(sizes);
      for (size_t i = 0; i < sizes.size(); ++i) fill(body.field(i), sizes[i]);
      made.add(std::move(body));
    }
    return made;
  }

 private:
  void fill(char* field, int64_t nbytes) {
    for (int64_t i = 0; i < nbytes && !body_.empty(); ++i) {
      field[i] = static_cast<char>(body_[next_]);
      next_ = next_ + 1 < body_.size() ? next_ + 1 : 0;
    }
  }

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

constexpr float kEach[] = {0.7f, -1.0f, 3.0f};  // of as many ranks as there are

struct Common {
  int64_t numel, ranks;
  bool clear, add;
  Alphas alpha;

  explicit Common(const Input& input)
      : numel(input.numel()),
        ranks(input.option(3, 1, 3)),
        clear(input.option(7, 0, 1)),
        add(input.option(7, 0, 3) > 1 || ranks > 1),
        alpha(input.option(11, 0, 1)      ? Alphas(kEach)
              : input.option(7, 0, 7) > 3 ? 1.0f
                                          : 0.7f) {}
};

void sparse(Input& input) {
  const Common c(input);
  const auto dtype = static_cast<Dtype>(input.option(1, 0, 2));
  const bool wide = input.option(2, 0, 1);
  const int64_t count = std::min(input.option(6, 0, 255), c.numel);
  const int64_t values_size = count * (dtype == Dtype::fp32 ? 4 : 2), indices_size = count * (wide ? 8 : 4);
  const Floats out = floats(c.numel);
  SparseJob job{{}, count, dtype, wide, out.get(), c.numel, c.alpha, c.clear, c.add, kThreads};
  const Bodies bodies = input.bodies(c.ranks, {values_size, indices_size});
  for (size_t rank = 0; rank < static_cast<size_t>(c.ranks); ++rank)
    job.rows.push_back({bodies[rank].field(0), bodies[rank].field(1)});
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
                indices_size = (chunks + more) * packed_bytes(k, index_bits);
  const Bodies bodies = input.bodies(c.ranks, {values_size, scales_size, indices_size});
  const Floats out = floats(c.numel);
  ChunkTopkDecode job{bodies.at(),
                      c.ranks,
                      bodies.offset(1),
                      bodies.offset(2),
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
  const Body body({chunks * packed_bytes(k, bits),
                   chunks * (bits > 8    ? 0
                             : bits == 2 ? 8
                                         : 4),
                   chunks * packed_bytes(k, index_bits)});
  const Reduced done = chunk_topk_reduce(job,
                                         {nullptr, Dtype::fp32, out.get(), c.numel, size, k, bits, index_bits,
                                          body.data(), 0, chunks, body.offset(1), body.offset(2)},
                                         3.0f, reading_of(input), kThreads);
  if (done.bad < 0) return;
  require_untouched(out, c.numel);
  for (size_t i = 0; i < body.sizes().size(); ++i) {
    require(std::all_of(body.field(i), body.field(i) + body.sizes()[i], [](char x) { return x == 0; }));
  }
}

void quantize(Input& input, bool reduce) {
  const Common c(input);
  constexpr int all_bits[] = {8, 4, 2, 2};
  const int64_t which = input.option(1, 0, 3);
  const int bits = all_bits[which];
  const bool two_levels = which == 3, stochastic = !two_levels && input.option(6, 0, 1);
  const int64_t size = int64_t{32} << input.option(2, 0, 8), chunks = ceil_div(c.numel, size);
  const int64_t codes_size = ceil_div(c.numel * bits, 8), scales_size = chunks * (two_levels ? 8 : 4);
  const Bodies bodies = input.bodies(c.ranks, {codes_size, scales_size});
  const Floats out = floats(c.numel);
  const DecodeInto into{out.get(), c.numel, c.alpha, c.clear, c.add, false};
  if (!reduce) {
    return quantize_decompress({bodies.at(), c.ranks, bodies.offset(1), size, bits, two_levels, into},
                               kThreads);
  }
  const Body body({codes_size, scales_size});
  quantize_reduce({bodies.at(), c.ranks, bodies.offset(1), size, bits, two_levels, {}},
                  {nullptr, Dtype::fp32, out.get(), c.numel, size, bits, two_levels, stochastic, input.seed(),
                   0, body.data(), 0, chunks, body.offset(1)},
                  3.0f, reading_of(input), kThreads);
}

void sign(Input& input, bool reduce) {
  const Common c(input);
  const int64_t size = int64_t{32} << input.option(2, 0, 8), chunks = ceil_div(c.numel, size);
  const Bodies bodies = input.bodies(c.ranks, {ceil_div(c.numel, 32) * 4, chunks * 4});
  const Floats out = floats(c.numel);
  const DecodeInto into{out.get(), c.numel, c.alpha, c.clear, c.add, false};
  if (!reduce) {
    return sign_decompress({bodies.at(), c.ranks, bodies.offset(1), size, into}, kThreads);
  }
  const Body body(bodies[0].sizes());
  sign_reduce({bodies.at(), c.ranks, bodies.offset(1), size, {}},
              {nullptr, Dtype::fp32, out.get(), c.numel, size, body.data(), 0, chunks, body.offset(1)}, 3.0f,
              reading_of(input), kThreads);
}

void random_k(Input& input) {
  const Common c(input);
  const auto dtype = static_cast<Dtype>(input.option(1, 0, 2));
  const int64_t k = std::min((input.option(2, 0, 255) << 4) + input.option(6, 1, 16), c.numel);
  const Bodies bodies = input.bodies(c.ranks, {k * (dtype == Dtype::fp32 ? 4 : 2)});
  const Floats out = floats(c.numel);
  random_k_decompress({bodies.at(), c.ranks, dtype, out.get(), c.alpha, c.clear, c.add},
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
