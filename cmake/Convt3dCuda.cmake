# Decides whether the CUDA backend is built, and for which GPUs. Both options are CMake's, and where they are not given,
# environment variables of the same name.
# Defines CONVT3D_WITH_CUDA; CONVT3D_CUDA_MISSING, the reason where it is off; CONVT3D_CUDA_ARCHITECTURE_NAMES;
# target convt3d_cublas_headers; and CONVT3D_CUBLAS_LIBRARY beside the headers, if it is there.
function(convt3d_option name default description)
  if(DEFINED ENV{${name}})
    string(REGEX REPLACE "[, ]+" ";" default "$ENV{${name}}")
  endif()
  set(${name} "${default}" CACHE STRING "${description}")
endfunction()

convt3d_option(CONVT3D_CUDA AUTO "Build the CUDA backend: AUTO, ON or OFF")
set_property(CACHE CONVT3D_CUDA PROPERTY STRINGS AUTO ON OFF)
convt3d_option(CONVT3D_CUDA_ARCHITECTURES ""
  "GPU architectures to build for, as CMAKE_CUDA_ARCHITECTURES; empty for all that the toolkit has, or 'native'")
if(NOT CONVT3D_CUDA MATCHES "^(AUTO|ON|OFF)$")
  message(FATAL_ERROR "CONVT3D_CUDA must be AUTO, ON or OFF, but is '${CONVT3D_CUDA}'")
endif()

set(CONVT3D_WITH_CUDA OFF)
set(CONVT3D_CUDA_MISSING "")

# Looks for what the backend needs; leaves the reason in CONVT3D_CUDA_MISSING where something is not there.
macro(convt3d_find_cuda)
  include(CheckLanguage)
  # CMake needs some architecture to try the compiler with; the real list follows once its version is known.
  if(NOT DEFINED CMAKE_CUDA_ARCHITECTURES)
    set(CMAKE_CUDA_ARCHITECTURES OFF)
    set(choose_architectures ON)
  endif()
  # A compiler that was not there at the last configuration may be there now.
  if(NOT CMAKE_CUDA_COMPILER)
    unset(CMAKE_CUDA_COMPILER CACHE)
  endif()
  check_language(CUDA)
  if(NOT CMAKE_CUDA_COMPILER)
    find_program(broken_compiler nvcc PATHS ENV PATH NO_DEFAULT_PATH NO_CACHE)
    if(broken_compiler)
      set(CONVT3D_CUDA_MISSING "${broken_compiler} does not compile: it may not support the host compiler \
${CMAKE_CXX_COMPILER} (${CMAKE_CXX_COMPILER_VERSION}); name one that it does in the environment variable CUDAHOSTCXX")
    else()
      set(CONVT3D_CUDA_MISSING "there is no CUDA compiler: install a CUDA toolkit, 12.4 or later, and put its nvcc on \
the PATH")
    endif()
  else()
    enable_language(CUDA)
    find_package(CUDAToolkit QUIET)
    if(CMAKE_CUDA_COMPILER_VERSION VERSION_LESS 12.4)
      set(CONVT3D_CUDA_MISSING "CUDA ${CMAKE_CUDA_COMPILER_VERSION} is too old: install a CUDA toolkit, 12.4 or later")
    elseif(NOT TARGET CUDA::cudart_static)
      set(CONVT3D_CUDA_MISSING "the CUDA toolkit has no libcudart_static.a: install its runtime's development files")
    else()
      convt3d_find_cublas_headers()
    endif()
  endif()
endmacro()

# cuBLAS's headers, from the toolkit or else from the nvidia-cublas package. Its library is not needed to build.
function(convt3d_find_cublas_headers)
  set(package_dirs "")
  if(Python_Interpreter_FOUND)
    execute_process(
      COMMAND ${Python_EXECUTABLE} -c
              "import importlib.util as u, pathlib as p
spec = u.find_spec('nvidia')
roots = [p.Path(r) for r in spec.submodule_search_locations] if spec else []
print(';'.join(str(h.parent) for r in roots for h in sorted(r.glob('*/include/cublas_v2.h'))))"
      OUTPUT_VARIABLE package_dirs OUTPUT_STRIP_TRAILING_WHITESPACE ERROR_QUIET)
  endif()
  find_path(CONVT3D_CUBLAS_INCLUDE_DIR cublas_v2.h HINTS ${CUDAToolkit_INCLUDE_DIRS} ${package_dirs} NO_CACHE)
  string(REGEX MATCH "^[0-9]+" toolkit ${CMAKE_CUDA_COMPILER_VERSION})
  if(toolkit EQUAL 12)
    set(advice "pip install nvidia-cublas-cu12, then build with pip install --no-build-isolation")
  else()
    set(advice "pip install nvidia-cublas, which CONVT3D_CUDA=ON pip install does by itself")
  endif()
  if(NOT CONVT3D_CUBLAS_INCLUDE_DIR)
    set(CONVT3D_CUDA_MISSING "there are no cuBLAS headers (cublas_v2.h) in the CUDA toolkit: install its cuBLAS \
development files, or ${advice}" PARENT_SCOPE)
    return()
  endif()
  file(STRINGS ${CONVT3D_CUBLAS_INCLUDE_DIR}/cublas_api.h version REGEX "#define CUBLAS_VER_MAJOR")
  if(NOT version MATCHES " ${toolkit}$")
    set(CONVT3D_CUDA_MISSING "the cuBLAS headers in ${CONVT3D_CUBLAS_INCLUDE_DIR} are not of CUDA ${toolkit}: ${advice}"
        PARENT_SCOPE)
    return()
  endif()
  find_library(CONVT3D_CUBLAS_LIBRARY libcublas.so.${toolkit}
               HINTS ${CUDAToolkit_LIBRARY_DIR} ${CONVT3D_CUBLAS_INCLUDE_DIR}/../lib NO_CACHE)
  set(CONVT3D_CUBLAS_LIBRARY ${CONVT3D_CUBLAS_LIBRARY} PARENT_SCOPE)
  add_library(convt3d_cublas_headers INTERFACE)
  # After the toolkit's own headers: a package of several libraries may hold others of another version.
  target_compile_options(convt3d_cublas_headers INTERFACE
    "$<$<COMPILE_LANGUAGE:CXX>:SHELL:-idirafter ${CONVT3D_CUBLAS_INCLUDE_DIR}>"
    "$<$<COMPILE_LANGUAGE:CUDA>:-Xcompiler=-idirafter,${CONVT3D_CUBLAS_INCLUDE_DIR}>")
endfunction()

if(CONVT3D_CUDA STREQUAL OFF)
  set(CONVT3D_CUDA_MISSING "built with CONVT3D_CUDA=OFF")
else()
  convt3d_find_cuda()
  if(NOT CONVT3D_CUDA_MISSING)
    set(CONVT3D_WITH_CUDA ON)
  elseif(CONVT3D_CUDA STREQUAL ON)
    message(FATAL_ERROR "CONVT3D_CUDA=ON, but ${CONVT3D_CUDA_MISSING}")
  endif()
endif()

if(CONVT3D_WITH_CUDA)
  if(CONVT3D_CUDA_ARCHITECTURES STREQUAL native)
    if(NOT CMAKE_CUDA_ARCHITECTURES_NATIVE)
      message(FATAL_ERROR "CONVT3D_CUDA_ARCHITECTURES is native, but nvcc sees no GPU here: name the architectures, "
                          "as in CONVT3D_CUDA_ARCHITECTURES=80,90")
    endif()
    set(CMAKE_CUDA_ARCHITECTURES ${CMAKE_CUDA_ARCHITECTURES_NATIVE})
  elseif(CONVT3D_CUDA_ARCHITECTURES)
    set(CMAKE_CUDA_ARCHITECTURES ${CONVT3D_CUDA_ARCHITECTURES})
  elseif(choose_architectures)
    set(CMAKE_CUDA_ARCHITECTURES 80 86 89 90)
    if(CMAKE_CUDA_COMPILER_VERSION VERSION_GREATER_EQUAL 12.8)
      list(APPEND CMAKE_CUDA_ARCHITECTURES 100 120)
    endif()
    # Machine code for each, and PTX of the newest for what comes after it.
    list(POP_BACK CMAKE_CUDA_ARCHITECTURES newest)
    list(TRANSFORM CMAKE_CUDA_ARCHITECTURES APPEND -real)
    list(APPEND CMAKE_CUDA_ARCHITECTURES ${newest})
  endif()
  # wgmma exists for 90a alone, whose code runs on every GPU of 9.0 and on no other: for those the PTX of 90 stays.
  list(TRANSFORM CMAKE_CUDA_ARCHITECTURES REPLACE "^90$" "90a-real;90-virtual")
  list(TRANSFORM CMAKE_CUDA_ARCHITECTURES REPLACE "^90-real$" "90a-real")
  list(JOIN CMAKE_CUDA_ARCHITECTURES " " CONVT3D_CUDA_ARCHITECTURE_NAMES)
  message(STATUS "convt3d: CUDA backend with CUDA ${CMAKE_CUDA_COMPILER_VERSION} for ${CONVT3D_CUDA_ARCHITECTURE_NAMES}")
elseif(CONVT3D_CUDA STREQUAL AUTO AND TARGET convt3d_cblas)
  message(WARNING "convt3d: building without the CUDA backend, because ${CONVT3D_CUDA_MISSING}. "
                  "With CONVT3D_CUDA=OFF, that is not worth a warning.")
endif()
