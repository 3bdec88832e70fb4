#include "cpu/isa/leaves.hpp"

#include "cpu/isa/chunk_decode.hpp"
#include "cpu/isa/chunk_topk.hpp"
#include "cpu/isa/index_codecs.hpp"
#include "cpu/isa/low_rank.hpp"
#include "cpu/isa/quantize.hpp"
#include "cpu/isa/random_k.hpp"
#include "cpu/isa/residual.hpp"
#include "cpu/isa/sign.hpp"
#include "cpu/isa/sparse.hpp"
#include "cpu/isa/topk.hpp"

#define GCK_STRING(x) #x
#define GCK_NAME(x) GCK_STRING(x)

namespace gck::GCK_ISA {

const Leaves& leaves() {
  static constexpr Leaves table{GCK_NAME(GCK_ISA),
                                topk_stream,
                                topk_look,
                                topk_maxima,
                                topk_collect,
                                topk_squares,
                                topk_split,
                                topk_kth,
                                topk_emit,
                                topk_clear,
                                add_to,
                                sparse_ascends,
                                sparse_move_out,
                                sparse_settle,
                                sign_compress,
                                sign_decompress,
                                sign_reduce,
                                chunk_topk_compress,
                                chunk_topk_compress_mean,
                                quantize_compress,
                                quantize_decompress,
                                quantize_reduce,
                                chunk_topk_first_bad,
                                chunk_topk_put,
                                random_k_draw,
                                random_k_picks,
                                random_k_add,
                                random_k_send,
                                elias_fano_low,
                                elias_fano_high,
                                elias_fano_count,
                                elias_fano_select,
                                block16_split,
                                block16_join,
                                residual_read,
                                residual_sums,
                                low_rank_basis,
                                low_rank_project,
                                low_rank_gram,
                                low_rank_solve,
                                low_rank_back_project,
                                low_rank_add,
                                low_rank_next_row,
                                low_rank_settle,
                                low_rank_decompress};
  return table;
}

}  // namespace gck::GCK_ISA
