// The Python module _C: argument conversion and nothing else. Tensors come as addresses, streams as integers.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <cstdint>

#include "convt3d/convt3d.h"

namespace py = pybind11;
using namespace convt3d;

namespace {

void* address(uintptr_t value) { return reinterpret_cast<void*>(value); }

Execution execution_of(int device, uintptr_t stream, int threads) { return {device, address(stream), threads}; }

py::dict build_info_dict() {
  const BuildInfo info = build_info();
  const auto text_or_none = [](const std::string& text) -> py::object {
    return text.empty() ? py::object(py::none()) : py::str(text);
  };
  py::dict result;
  result["version"] = info.version;
  result["backends"] = info.backends;
  result["cblas"] = text_or_none(info.cblas);
  result["openmp"] = info.openmp;
  result["cuda_version"] = text_or_none(info.cuda_version);
  result["cuda_architectures"] = info.cuda_architectures;
  result["cuda_missing"] = text_or_none(info.cuda_missing);
  result["cublas"] = text_or_none(info.cublas);
  return result;
}

}  // namespace

PYBIND11_MODULE(_C, m) {
  m.doc() = "Transposed 3-D convolution over raw pointers; convt3d_gemm wraps it for torch tensors.";

  py::enum_<DataType>(m, "DataType")
      .value("float64", DataType::float64)
      .value("float32", DataType::float32)
      .value("float16", DataType::float16)
      .value("bfloat16", DataType::bfloat16);
  py::enum_<Layout>(m, "Layout").value("ncdhw", Layout::ncdhw).value("ndhwc", Layout::ndhwc);
  py::enum_<Precision>(m, "Precision").value("ieee", Precision::ieee).value("tf32", Precision::tf32);
  py::enum_<Algorithm>(m, "Algorithm").value("gemm", Algorithm::gemm).value("direct", Algorithm::direct);
  py::enum_<Operator>(m, "Operator")
      .value("forward", Operator::forward)
      .value("grad_input", Operator::grad_input)
      .value("grad_weight", Operator::grad_weight)
      .value("grad_input_weight", Operator::grad_input_weight)
      .value("grad_bias", Operator::grad_bias);

  py::class_<Problem>(m, "Problem")
      .def(py::init([](int64_t batch, int64_t in_channels, int64_t out_channels, int64_t groups, Extent input,
                       Extent kernel, Extent stride, Extent padding, Extent output_padding, Extent dilation,
                       Layout layout, DataType dtype, Precision precision) {
             Problem problem{batch,   in_channels,    out_channels, groups, input, kernel,   stride,
                             padding, output_padding, dilation,     layout, dtype, precision};
             problem.validate();
             return problem;
           }),
           py::kw_only(), py::arg("batch"), py::arg("in_channels"), py::arg("out_channels"), py::arg("groups"),
           py::arg("input"), py::arg("kernel"), py::arg("stride"), py::arg("padding"), py::arg("output_padding"),
           py::arg("dilation"), py::arg("layout"), py::arg("dtype"), py::arg("precision"))
      .def_property_readonly("output", &Problem::output);

  py::class_<Target>(m, "Target")
      .def_static("cpu", &Target::cpu, py::arg("threads"))
      .def_static("cuda", py::overload_cast<int>(&Target::cuda), py::arg("device"))
      .def_static("cuda", py::overload_cast<int, int, int>(&Target::cuda), py::kw_only(), py::arg("compute_capability"),
                  py::arg("multiprocessors"), py::arg("shared_memory"))
      .def_readwrite("compute_capability", &Target::compute_capability)
      .def_readonly("shared_memory", &Target::shared_memory);

  const auto release = py::call_guard<py::gil_scoped_release>();
  py::class_<Plan>(m, "Plan")
      .def(py::init(&make_plan), py::arg("problem"), py::arg("operator"), py::arg("target"), py::arg("workspace_limit"),
           py::arg("algorithm") = Algorithm::gemm)
      .def_readonly("configuration", &Plan::configuration)
      .def_readonly("expected_cycles", &Plan::expected_cycles)
      .def_readonly("workspace_bytes", &Plan::workspace_bytes)
      .def_readonly("column_bytes", &Plan::column_bytes)
      .def_readonly("partial_bytes", &Plan::partial_bytes)
      .def_readonly("weight_bytes", &Plan::weight_bytes)
      .def_readonly("fits", &Plan::fits)
      .def_readonly("samples", &Plan::samples)
      .def_readonly("channels", &Plan::channels)
      .def_readonly("output_planes", &Plan::output_planes)
      .def_readonly("voxels", &Plan::voxels)
      .def_readonly("splits", &Plan::splits)
      .def_readonly("partials", &Plan::partials)
      .def_readonly("reduction", &Plan::reduction)
      .def(
          "forward",
          [](const Plan& plan, uintptr_t input, uintptr_t weight, uintptr_t bias, uintptr_t output, uintptr_t workspace,
             int device, uintptr_t stream, int threads) {
            forward(plan, address(input), address(weight), address(bias), address(output), address(workspace),
                    execution_of(device, stream, threads));
          },
          release)
      .def(
          "grad_input",
          [](const Plan& plan, uintptr_t grad_output, uintptr_t weight, uintptr_t result, uintptr_t workspace,
             int device, uintptr_t stream, int threads) {
            grad_input(plan, address(grad_output), address(weight), address(result), address(workspace),
                       execution_of(device, stream, threads));
          },
          release)
      .def(
          "grad_weight",
          [](const Plan& plan, uintptr_t grad_output, uintptr_t input, uintptr_t result, uintptr_t workspace,
             int device, uintptr_t stream, int threads) {
            grad_weight(plan, address(grad_output), address(input), address(result), address(workspace),
                        execution_of(device, stream, threads));
          },
          release)
      .def(
          "grad_input_weight",
          [](const Plan& plan, uintptr_t grad_output, uintptr_t input, uintptr_t weight, uintptr_t input_result,
             uintptr_t weight_result, uintptr_t workspace, int device, uintptr_t stream, int threads) {
            grad_input_weight(plan, address(grad_output), address(input), address(weight), address(input_result),
                              address(weight_result), address(workspace), execution_of(device, stream, threads));
          },
          release)
      .def(
          "grad_bias",
          [](const Plan& plan, uintptr_t grad_output, uintptr_t result, uintptr_t workspace, int device,
             uintptr_t stream, int threads) {
            grad_bias(plan, address(grad_output), address(result), address(workspace),
                      execution_of(device, stream, threads));
          },
          release);

  m.def("build_info", &build_info_dict);
}
